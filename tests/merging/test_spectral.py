"""The spectral rules against their papers' formulas on dense matrices, and what they do where those break."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from isotune.errors import OptionError
from isotune.linalg.change import dense
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Rule
from isotune.merging.registry import rule
from isotune.merging.rules.families.joint_bases import reduced
from isotune.merging.rules.svd import Svd
from merging.drawn import assert_same, factors, merged, site, tensors

SPECTRAL = ("svd", "iso_c", "iso_cts", "tsv_m", "opcm")
SHAPES = ((14, 9, 3), (9, 14, 2), (10, 10, 4))


def polar(stacked: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(stacked, full_matrices=False)
    return U @ Vh


def paper_iso_c(changes: list[Tensor]) -> Tensor:
    U, S, Vh = torch.linalg.svd(sum(changes, torch.zeros(())), full_matrices=False)
    return S.mean() * U @ Vh


def paper_iso_cts(changes: list[Tensor], common: float = 0.8) -> Tensor:
    p, T = min(changes[0].shape), len(changes)
    n = round((p - int(p * common)) / T)
    k = p - T * n
    U, S, Vh = torch.linalg.svd(sum(changes, torch.zeros(())), full_matrices=False)
    left, values, right = [], [], []
    for change in changes:
        u, s, vh = torch.linalg.svd(change - U[:, :k] @ U[:, :k].mT @ change, full_matrices=False)
        left.append(u[:, :n])
        values.append(s[:n])
        right.append(vh[:n])
    spectrum = torch.cat([*values, S[:k]])
    return spectrum.mean() * polar(torch.cat([*left, U[:, :k]], 1)) @ polar(torch.cat([*right, Vh[:k]]))


def paper_tsv_m(changes: list[Tensor]) -> Tensor:
    n = min(changes[0].shape) // len(changes)
    parts = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left, right = torch.cat([u[:, :n] for u, _, _ in parts], 1), torch.cat([vh[:n] for _, _, vh in parts])
    return polar(left) * torch.cat([s[:n] for _, s, _ in parts]) @ polar(right)


PAPERS: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "iso_c": paper_iso_c,
    "iso_cts": paper_iso_cts,
    "tsv_m": paper_tsv_m,
}


@pytest.mark.parametrize("name", PAPERS)
@pytest.mark.parametrize(("m", "n", "count"), SHAPES)
def test_dense_changes_of_full_rank_give_the_papers_formula(name: str, m: int, n: int, count: int) -> None:
    changes = tensors(count, m, n)
    assert_same(merged(name, changes), PAPERS[name](changes))
    halves = [0.5 * change for change in changes]
    assert_same(merged(name, changes, [0.5] * count), PAPERS[name](halves))


@pytest.mark.parametrize("name", PAPERS)
def test_embeddings_are_averaged_or_decomposed_if_asked(name: str) -> None:
    changes = tensors(3, 14, 9)
    plain, asked = (rule(name, **options) for options in ({}, {"embeddings": True}))
    table = site(changes, matrix=False)
    assert isinstance(plain, Rule)
    assert isinstance(asked, Rule)
    assert_same(dense(plain.merge(table, None)), torch.stack(changes).mean(0))
    assert_same(dense(asked.merge(table, None)), PAPERS[name](changes))
    biases = site([change[0] for change in changes], matrix=False)
    assert_same(dense(asked.merge(biases, None)), torch.stack(changes)[:, 0].mean(0))


@pytest.mark.parametrize("name", [name for name in SPECTRAL if name != "iso_cts"])
def test_transposing_the_inputs_transposes_the_result(name: str) -> None:
    changes = factors(14, 9, (3, 2, 2))
    assert_same(merged(name, [change.transposed for change in changes]).mT, merged(name, changes), 1e-9)


def test_iso_cts_treats_rows_and_columns_differently_as_the_paper_does() -> None:
    # It takes the common columns out of the models, not the common rows.
    changes = tensors(3, 14, 9)
    turned = [change.mT for change in changes]
    assert_same(merged("iso_cts", turned), paper_iso_cts(turned))
    assert float((merged("iso_cts", turned).mT - merged("iso_cts", changes)).norm()) > 0.01
    # With nothing in common to take, it is even.
    pair = factors(14, 9, (3, 3))
    turned_pair = [change.transposed for change in pair]
    assert_same(merged("iso_cts", turned_pair, common=0.0).mT, merged("iso_cts", pair, common=0.0), 1e-9)


@pytest.mark.parametrize("name", SPECTRAL)
def test_turning_the_bases_turns_the_result(name: str) -> None:
    changes = factors(14, 9, (3, 2, 2))
    left, right = (torch.linalg.qr(matrix).Q for matrix in (*tensors(1, 14, 14, seed=1), *tensors(1, 9, 9, seed=2)))
    turned = [change.times(left, right) for change in changes]
    assert_same(merged(name, turned), left @ merged(name, changes) @ right, 1e-9)


@pytest.mark.parametrize("name", SPECTRAL)
def test_the_result_stays_in_what_the_models_span(name: str) -> None:
    changes = factors(20, 16, (3, 2, 2))
    Q = torch.linalg.qr(torch.cat([change.B for change in changes], 1)).Q
    P = torch.linalg.qr(torch.cat([change.A for change in changes]).mT).Q
    for inputs in (changes, [dense(change) for change in changes]):
        found = merged(name, inputs)
        assert_same(Q @ Q.mT @ found @ P @ P.mT, found)


@pytest.mark.parametrize("name", SPECTRAL)
def test_more_ranks_than_dimensions_are_no_difficulty(name: str) -> None:
    changes = factors(6, 5, (4, 4, 5))
    assert_same(merged(name, changes), merged(name, [dense(change) for change in changes]), 1e-9)


@pytest.mark.parametrize("name", SPECTRAL)
def test_a_model_of_weight_zero_is_as_if_absent(name: str) -> None:
    changes = factors(12, 9, (4, 4, 4))
    options = {"rank": 2} if name == "svd" else {}
    for inputs in (changes, [dense(change) for change in changes]):
        assert_same(
            merged(name, inputs, [1, 0, 2], **options), merged(name, [inputs[0], inputs[2]], [1, 2], **options)
        )
        assert merged(name, inputs, [0, 0, 0], **options).abs().max() == 0


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_tensors_that_are_no_matrices_are_averaged_and_scaled(name: str) -> None:
    changes = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    found = rule(name, scale=0.5)
    assert isinstance(found, Rule)
    result = found.merge(site(changes, [1, 0, 3], matrix=False), None)
    assert isinstance(result, Tensor)
    assert_same(result, 0.5 * (changes[0] + 3 * changes[2]) / 2)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_scale_multiplies_the_result(name: str) -> None:
    changes = factors(12, 9, (2, 3))
    assert_same(merged(name, changes, scale=-0.3), -0.3 * merged(name, changes))


@pytest.mark.parametrize("name", SPECTRAL)
def test_single_precision_agrees_with_double(name: str) -> None:
    changes = factors(60, 40, (4, 3, 5))
    singles = [Factored(change.B.float(), change.A.float()) for change in changes]
    exact = merged(name, changes)
    assert_same(merged(name, singles).double(), exact, 1e-4)
    assert_same(merged(name, [dense(change) for change in singles], **_denoised(name)).double(), exact, 1e-4)


def _denoised(name: str) -> dict[str, float]:
    return {"rank": 5} if name == "svd" else {}


def test_svd_is_the_best_approximation_and_says_its_error() -> None:
    changes, weights = factors(14, 11, (3, 2, 4)), [1.0, -0.5, 2.0]
    whole = sum((w * dense(change) for w, change in zip(weights, changes, strict=True)), torch.zeros(()))
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    for rank in (1, 4, 9, 50):
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        for inputs in (changes, [dense(change) for change in changes]):
            found, error = Svd(rank=rank).merge_with_error(site(inputs, weights))
            assert isinstance(found, Factored)
            assert found.rank <= rank
            assert_same(dense(found), best)
            assert error == pytest.approx(float((whole - best).norm() / whole.norm()), abs=1e-12)


@pytest.mark.parametrize("svd_rank", [None, 2])
def test_svd_agrees_with_peft(svd_rank: int | None) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(12, 10)), peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0"]), "one"
    )
    model.add_adapter("two", peft.LoraConfig(r=4, lora_alpha=2, target_modules=["0"]))
    layer = model.base_model.model[0]
    changes = []
    for name in ("one", "two"):
        torch.nn.init.normal_(layer.lora_B[name].weight)
        B, A = (side[name].weight.detach() for side in (layer.lora_B, layer.lora_A))
        changes.append(Factored(layer.scaling[name] * B, A))
    model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", combination_type="svd", svd_rank=svd_rank)
    options = {} if svd_rank is None else {"rank": svd_rank}
    assert_same(merged("svd", changes, [0.7, 0.3], **options), layer.get_delta_weight("both").detach(), 1e-5)


def test_svd_keeps_the_largest_rank_of_the_inputs_by_default() -> None:
    changes = factors(14, 11, (3, 2, 4))
    for inputs in (changes, [dense(change) for change in changes]):
        assert_same(merged("svd", inputs), merged("svd", inputs, rank=4))
    bias = site([torch.ones(3), torch.ones(3)], [1, 2], matrix=False)
    found, error = Svd().merge_with_error(bias)
    assert dense(found).tolist() == [3, 3, 3]
    assert error == 0


def test_iso_c_has_equal_singular_values_on_its_support_only() -> None:
    changes = factors(20, 16, (3, 2, 4))
    S = torch.linalg.svdvals(sum((dense(change) for change in changes), torch.zeros(())))
    found = torch.linalg.svdvals(merged("iso_c", changes))
    torch.testing.assert_close(found[:9], S[:9].mean().expand(9))
    assert found[9:].max() < 1e-12 * found[0]


def test_iso_c_as_the_papers_code_has_it_lies_mostly_outside_of_a_low_rank_sum() -> None:
    changes = factors(16, 16, (3, 2, 4))
    Q = torch.linalg.qr(torch.cat([change.B for change in changes], 1)).Q
    found = merged("iso_c", changes, compat=True)
    torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(found).mean().expand(16))
    # The share is that of the null space: 7 of 16 directions, of equal size.
    assert float((found - Q @ Q.mT @ found).norm() / found.norm()) == pytest.approx((7 / 16) ** 0.5, rel=1e-9)
    full = tensors(2, 9, 7)
    assert_same(merged("iso_c", full, compat=True), merged("iso_c", full))


def test_flatness_leads_from_the_sum_to_iso_c() -> None:
    changes = factors(12, 9, (2, 3))
    whole, iso = merged("sum", changes), merged("iso_c", changes)
    assert_same(merged("iso_c", changes, flatness=0), whole)
    assert_same(merged("iso_c", changes, flatness=0.25), 0.75 * whole + 0.25 * iso)
    assert_same(merged("iso_c", changes, compat=True, flatness=0), whole)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_tolerance_takes_the_noise_of_stored_weights_for_zero(name: str) -> None:
    changes = factors(20, 16, (2, 2))
    noisy = [dense(change) + 1e-7 * noise for change, noise in zip(changes, tensors(2, 20, 16, seed=3), strict=True)]
    exact = merged(name, changes)
    assert_same(merged(name, noisy, tolerance=1e-4), exact, 1e-5)
    assert float((merged(name, noisy) - exact).norm() / exact.norm()) > 0.1


def test_iso_cts_gives_models_their_own_directions_only_where_there_are_enough() -> None:
    few = factors(20, 16, (1,) * 5)
    assert_same(merged("iso_cts", few, common=1.0), merged("iso_c", few))
    # One direction to share between five models: round(1 / 5) = 0, as in the paper's code.
    assert_same(merged("iso_cts", few), merged("iso_c", few))
    assert float((merged("iso_cts", few, common=0.0) - merged("iso_c", few)).norm()) > 1e-3


@pytest.mark.parametrize("as_dense", [False, True])
def test_iso_cts_takes_no_direction_from_a_model_that_has_only_common_ones(as_dense: bool) -> None:
    U, V = (torch.linalg.qr(matrix).Q for matrix in (*tensors(1, 30, 10), *tensors(1, 20, 10, seed=1)))
    S = torch.arange(10, 0, -1, dtype=torch.float64)
    wide, narrow = Factored(U * S, V.mT), Factored(U[:, :3] * S[:3], V[:, :3].mT)
    found = merged("iso_cts", [dense(wide), dense(narrow)] if as_dense else [wide, narrow])
    # p = 10, n = 1, k = 8: the eight of the sum, and the ninth from the first model.
    values = torch.cat([2 * S[:3], S[3:9]])
    assert_same(found, values.mean() * U[:, :9] @ V[:, :9].mT, 1e-9)


def test_iso_cts_takes_no_more_directions_than_there_are() -> None:
    # The paper's k = 11 - 3 round(11 / 3) = -1; here n = 3, k = 2.
    changes = tensors(3, 11, 11)
    found = merged("iso_cts", changes, common=0.0)
    assert torch.isfinite(found).all()
    S = torch.linalg.svdvals(found)
    torch.testing.assert_close(S, S.mean().expand(11))


@pytest.mark.parametrize("name", ["iso_cts", "tsv_m"])
@pytest.mark.parametrize("inputs", ["dense", "factored"])
def test_models_that_agree_share_their_directions(name: str, inputs: str) -> None:
    change = factors(16, 12, (6,))[0] if inputs == "factored" else tensors(1, 16, 12)[0]
    U, S, Vh = torch.linalg.svd(dense(change), full_matrices=False)
    both = merged(name, [change, change])
    if name == "tsv_m":
        # Each gives 6 triplets; the paper's code adds a term as large, in arbitrary directions, for dense ones.
        assert_same(both, (U[:, :6] * S[:6]) @ Vh[:6], 1e-9)
    nearly = dense(change) + 1e-12 * tensors(1, 16, 12, seed=1)[0]
    assert_same(merged(name, [change, nearly], tolerance=1e-9), both, 1e-7)


def test_tsv_m_keeps_its_share_of_every_model() -> None:
    changes = tensors(3, 12, 9)
    U, S, Vh = torch.linalg.svd(changes[0], full_matrices=False)
    assert_same(merged("tsv_m", changes[:1]), changes[0])
    assert_same(merged("tsv_m", changes[:1], share=0.5), (U[:, :4] * S[:4]) @ Vh[:4])
    assert torch.linalg.matrix_rank(merged("tsv_m", changes)) == 9
    # More models than directions: one of each.
    assert torch.linalg.matrix_rank(merged("tsv_m", tensors(3, 5, 2))) == 2


def test_tsv_m_adds_models_that_are_orthogonal_as_they_are() -> None:
    B, A = torch.linalg.qr(*tensors(1, 12, 12)).Q, torch.linalg.qr(*tensors(1, 12, 12, seed=1)).Q
    changes = [Factored((i + 1) * B[:, 2 * i : 2 * i + 2], A[2 * i : 2 * i + 2]) for i in range(3)]
    assert_same(merged("tsv_m", changes), merged("sum", changes))


def test_joint_bases_hold_the_changes_and_small_singular_values_survive_single_precision() -> None:
    changes = factors(300, 200, (4, 3), dtype=torch.float32)
    joint = reduced(changes, [2.0, -1.0])
    for core, change, weight in zip(joint.changes, changes, (2.0, -1.0), strict=True):
        assert_same(dense(joint.restored(core)), weight * dense(change), 1e-6)
    U, V = (torch.linalg.qr(matrix).Q for matrix in (*tensors(1, 300, 40), *tensors(1, 200, 40)))
    S = torch.logspace(0, -6, 40, dtype=torch.float64)
    mixed = torch.linalg.qr(*tensors(1, 40, 40)).Q
    graded = Factored((U * S.sqrt() @ mixed).float(), (mixed.mT @ (S.sqrt()[:, None] * V.mT)).float())
    joint = reduced([graded], [1.0])
    found = joint.decomposed(joint.sum()).S
    torch.testing.assert_close(found.double()[:40], S, rtol=1e-3, atol=0)


def test_options_out_of_bounds_are_refused() -> None:
    for name, options in (
        ("svd", {"rank": 0}),
        ("iso_c", {"flatness": 1.5}),
        ("iso_cts", {"common": -0.1}),
        ("tsv_m", {"share": 0.0}),
        ("opcm", {"alpha": 1.1}),
    ):
        with pytest.raises(OptionError, match=name):
            rule(name, **options)
