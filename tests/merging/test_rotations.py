"""Orthogonal adapters merged as rotations, against dense d x d matrices, and through files."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import isotune
from isotune import HRA, LoRA, Settings
from isotune.adapters.contract import Adapter
from isotune.adapters.orthogonal.ether import ETHER
from isotune.adapters.orthogonal.hoft import HOFT
from isotune.adapters.orthogonal.hra import HRAAdapter
from isotune.adapters.orthogonal.oft import OFT, OFTAdapter
from isotune.adapters.orthogonal.shoft import SHOFT
from isotune.adapters.orthogonal.two_sided import TwoSided
from isotune.checkpoint.parts import stored_parts
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.save import write_parts
from isotune.errors import OptionError
from isotune.linalg.cayley import above_diagonal, upper_of
from isotune.linalg.householder import dense_reflections
from isotune.merging.contract import RotationRule
from isotune.merging.registry import rule, rule_class, rule_names
from isotune.sites import LinearSite, Site, require_site
from peers import peft_load
from support import adapted, assert_same_output, move, output, stories

Part = tuple[Settings, Adapter]

METHODS: dict[str, Settings] = {
    "hra": HRA(rank=4),
    "hra, odd": HRA(rank=3, start="random"),
    "hra, strict": HRA(rank=4, strict=True, start="random"),
    "hra, anchored": HRA(rank=3, start="anchored"),
    "hra, strict and anchored": HRA(rank=2, strict=True),
    "hra, outputs": HRA(rank=4, side="out"),
    "ether": ETHER(blocks=2),
    "hoft": HOFT(rank=4),
    "hoft, odd": HOFT(rank=3),
    "oft": OFT(block=4),
    "oft, shared": OFT(block=4, share=True),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
every_rule = pytest.mark.parametrize("name", [n for n in rule_names() if issubclass(rule_class(n), RotationRule)])


def site(n_in: int = 16, n_out: int = 24) -> Site:
    return LinearSite(nn.Linear(n_in, n_out))


def part(
    method: Settings, seed: int, at: Site | None = None, size: float = 0.1, dtype: torch.dtype = torch.float64
) -> Part:
    """An adapter near the start that all of its method have."""
    adapter = method.build(at or site(), torch.Generator().manual_seed(0)).to(dtype)
    return method, move(adapter, seed, size)


def three(method: Settings, **options: Any) -> list[Part]:
    return [part(method, seed, **options) for seed in (1, 2, 3)]


def merged(name: str, parts: Sequence[Part], weights: Sequence[float] | None = None, **options: Any) -> Part:
    found = rule(name, **options)
    assert isinstance(found, RotationRule)
    return found.merge(site(), parts, [1.0] * len(parts) if weights is None else weights)


@torch.no_grad()
def dense(adapter: Adapter) -> list[Tensor]:
    """R (d, d) of `W R` or `Rᵀ W`, of each side that the adapter rotates."""
    if isinstance(adapter, TwoSided):
        return [*dense(adapter.inner), *dense(adapter.outer)]
    any_adapter: Any = adapter
    d = _size(any_adapter)
    changed = adapter.double().weight(torch.eye(d, dtype=torch.float64))
    return [changed if any_adapter.side == "in" else changed.mT]


def _size(adapter: Any) -> int:
    return 16 if adapter.side == "in" else 24


def dense_log(R: Tensor) -> Tensor:
    """By square roots (Denman and Beavers) until the series of log(I - X) applies."""
    eye, doublings = torch.eye(len(R), dtype=R.dtype), 0
    while torch.linalg.matrix_norm(R - eye) > 0.1:
        inverse = eye
        for _ in range(12):
            R, inverse = (R + inverse.inverse()) / 2, (inverse + R.inverse()) / 2
        doublings += 1
    X = eye - R
    power, log = X, -X
    for n in range(2, 16):
        power = power @ X
        log = log - power / n
    return 2**doublings * log


def dense_mean(rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    M = rotations[0]
    for _ in range(30):
        M = M @ torch.linalg.matrix_exp(weighted_logs(M, rotations, weights))
    return M


def weighted_logs(M: Tensor, rotations: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """What is zero at the mean."""
    logs = [w * dense_log(torch.linalg.solve(M, R)) for w, R in zip(weights, rotations, strict=True)]
    return torch.stack(logs).sum(dim=0)


def assert_same(found: Adapter, expected: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    got = dense(found)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


@every_rule
@every_method
def test_the_result_is_orthogonal_and_of_the_same_method(name: str, method: Settings) -> None:
    settings, adapter = merged(name, three(method), [0.5, 1.0, 1.0] if name == "karcher" else None)
    assert adapter.method == settings.name == ("hra" if method.name == "ether" else method.name)
    for R in dense(adapter):
        assert (R.mT @ R - torch.eye(len(R), dtype=torch.float64)).abs().max() < 1e-10


@every_rule
@every_method
def test_one_adapter_alone_is_itself(name: str, method: Settings) -> None:
    given = part(method, 1)
    settings, adapter = merged(name, [given])
    assert settings == method
    assert adapter is not given[1]
    state = given[1].state_dict()
    assert all(tensor.equal(state[key]) for key, tensor in adapter.state_dict().items())
    settings, adapter = merged("karcher", [given], [0.3])
    assert settings == method


@every_method
def test_compose_is_one_adapter_after_the_other(method: Settings) -> None:
    parts = three(method)
    adapter = merged("compose", parts)[1]
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = W
    for _, own in parts:
        expected = own.weight(expected)
    torch.testing.assert_close(adapter.weight(W), expected, rtol=0, atol=1e-12)
    backwards = merged("compose", parts[::-1])[1].weight(W)
    assert (backwards - expected).abs().max() > 1e-3


@pytest.mark.parametrize("side", ["in", "out"])
def test_compose_puts_reflections_side_by_side(side: Any) -> None:
    parts = three(HRA(rank=3, start="random", side=side))
    settings, adapter = merged("compose", parts)
    assert settings == HRA(rank=9, start="random", side=side)
    assert torch.cat([own.U for _, own in parts], dim=1).equal(adapter.U)


def test_compose_of_more_reflections_than_dimensions_takes_no_more_than_there_are() -> None:
    parts = three(HRA(rank=7, start="random"))
    settings, adapter = merged("compose", parts)
    assert settings.rank <= 16
    assert_same(adapter, [dense(parts[0][1])[0] @ dense(parts[1][1])[0] @ dense(parts[2][1])[0]])


@pytest.mark.parametrize("method", ["hra", "hra, anchored", "hra, outputs", "hoft", "oft", "oft, shared"])
def test_weights_of_compose_are_powers(method: str) -> None:
    one, other = part(METHODS[method], 1), part(METHODS[method], 2)
    half = merged("compose", [one], [0.5])
    assert_same(merged("compose", [half, half])[1], dense(one[1]))
    assert_same(merged("compose", [one], [2.0])[1], [R @ R for R in dense(one[1])])
    assert_same(merged("compose", [one], [-1.0])[1], [R.mT for R in dense(one[1])])
    assert_same(merged("compose", [one, other], [0.0, 1.0])[1], dense(other[1]))
    identity = [torch.eye(len(R), dtype=torch.float64) for R in dense(one[1])]
    assert_same(merged("compose", [one, one], [1.0, -1.0])[1], identity)
    assert_same(merged("compose", [one], [0.0])[1], identity)


@every_method
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.5, 0.3)])
def test_karcher_is_the_dense_mean(method: Settings, weights: Sequence[float]) -> None:
    parts = three(method)
    shares = [w / sum(weights) for w in weights]
    expected = [dense_mean(rotations, shares) for rotations in zip(*(dense(own) for _, own in parts), strict=True)]
    found = merged("karcher", parts, weights)[1]
    assert_same(found, expected, 1e-9)
    for M, *rotations in zip(dense(found), *(dense(own) for _, own in parts), strict=True):
        assert weighted_logs(M, rotations, shares).abs().max() < 1e-10


@every_method
def test_karcher_does_not_know_the_order(method: Settings) -> None:
    parts, weights = three(method), (0.2, 0.5, 0.3)
    expected = dense(merged("karcher", parts, weights)[1])
    for order in itertools.permutations(range(3)):
        assert_same(merged("karcher", [parts[i] for i in order], [weights[i] for i in order])[1], expected)


@every_method
def test_karcher_of_equal_rotations_is_that_rotation_and_a_weight_of_zero_is_nothing(method: Settings) -> None:
    one, other = part(method, 1), part(method, 2)
    assert_same(merged("karcher", [one, one], [0.3, 0.9])[1], dense(one[1]))
    assert_same(merged("karcher", [other, one, one], [0.0, 1, 1])[1], dense(one[1]))


@pytest.mark.parametrize("method", ["hra", "hra, anchored", "hra, outputs", "hoft", "oft", "oft, shared"])
def test_karcher_of_a_rotation_and_its_inverse_is_the_identity(method: str) -> None:
    one = part(METHODS[method], 1)
    found = merged("karcher", [one, merged("compose", [one], [-1.0])])[1]
    assert_same(found, [torch.eye(len(R), dtype=torch.float64) for R in dense(one[1])])


def plane(angle: float, first: int, second: int) -> Tensor:
    """Two reflections (16, 2) that turn the plane of two coordinates by the angle."""
    U = torch.zeros(16, 2, dtype=torch.float64)
    U[first, 0] = 1
    U[first, 1], U[second, 1] = math.cos(angle / 2), math.sin(angle / 2)
    return U


def of_columns(U: Tensor) -> Part:
    return HRA(rank=U.shape[1], start="random"), HRAAdapter(U)


def test_karcher_in_a_common_plane_is_the_mean_angle() -> None:
    parts = [of_columns(plane(angle, 3, 7)) for angle in (0.2, 0.8, 1.4)]
    settings, adapter = merged("karcher", parts, [0.5, 0.25, 0.25])
    assert settings.rank == 2
    assert_same(adapter, [dense_reflections(plane(0.65, 3, 7))])


def test_karcher_of_two_reflections_is_the_one_that_bisects() -> None:
    one, other = torch.eye(16, dtype=torch.float64)[:, :1], plane(0.8, 0, 5)[:, 1:]
    settings, adapter = merged("karcher", [of_columns(one), of_columns(other)])
    assert settings.rank == 1
    assert_same(adapter, [dense_reflections(plane(0.4, 0, 5)[:, 1:])])


@pytest.mark.parametrize("method", ["hra", "hra, odd", "hra, outputs", "hoft"])
def test_the_rank_is_at_most_the_sum_of_ranks(method: str) -> None:
    parts = [part(METHODS[method], seed) for seed in (1, 2)]
    limit = sum(settings.rank for settings, _ in parts)  # type: ignore[attr-defined]
    settings: Any = merged("karcher", parts)[0]
    assert settings.rank <= limit
    assert settings.rank >= limit - 1
    assert merged("karcher", [parts[0], parts[0]])[0].rank == (4 if method == "hoft, odd" else limit // 2)


def test_hoft_pads_the_side_that_needs_fewer_reflections() -> None:
    one = part(HOFT(rank=4), 1)
    other = copy.deepcopy(one)
    with torch.no_grad():
        other[1].inner.U.add_(0.1 * torch.randn(16, 4, generator=torch.Generator().manual_seed(4)))
    settings, adapter = merged("karcher", [one, other])
    assert settings == HOFT(rank=8)
    assert_same(adapter.outer, dense(one[1].outer))


def test_shared_and_own_blocks_mix() -> None:
    one, other = part(OFT(block=4, share=True), 1), part(OFT(block=4), 2)
    settings, adapter = merged("compose", [one, other])
    assert settings == OFT(block=4)
    assert_same(adapter, [dense(one[1])[0] @ dense(other[1])[0]])


def test_the_dtype_is_kept_and_decides_the_accuracy() -> None:
    for name, method in itertools.product(("compose", "karcher"), METHODS.values()):
        parts = three(method, dtype=torch.float32)
        found = merged(name, parts)[1]
        assert {p.dtype for p in found.parameters()} == {torch.float32}
        exact = merged(name, [(settings, copy.deepcopy(own).double()) for settings, own in parts])[1]
        assert_same(found, dense(exact), 2e-6)


def test_strict_columns_that_depend_on_each_other_stay_no_reflection() -> None:
    settings, own = part(HRA(rank=3, strict=True, start="random"), 1, dtype=torch.float32)
    with torch.no_grad():
        own.U[:, 2] = own.U[:, 0] + own.U[:, 1]
    other = part(HRA(rank=2, start="random"), 2, dtype=torch.float32)
    columns = own.columns().double()
    assert not columns[:, 2].any()
    composed = merged("compose", [(settings, own), other])
    assert composed[0].rank == 4
    expected = dense_reflections(columns) @ dense_reflections(other[1].U.detach().double())
    assert_same(composed[1], [expected], 1e-6)


def test_inputs_stay_as_they_were() -> None:
    for name, method in itertools.product(("compose", "karcher"), METHODS.values()):
        parts = three(method, dtype=torch.float32)
        before = [copy.deepcopy(own.state_dict()) for _, own in parts]
        merged(name, parts, [0.5, 0.25, 0.25] if name == "karcher" else [1, 2, 1])
        for state, (_, own) in zip(before, parts, strict=True):
            assert all(tensor.equal(state[key]) for key, tensor in own.state_dict().items())
            assert {p.dtype for p in own.parameters()} == {torch.float32}


def test_a_truncated_series_counts_as_the_nearest_rotation() -> None:
    method = OFT(block=4, terms=6)
    parts = [part(method, seed, size=0.05) for seed in (1, 2)]
    off = max(
        float((R.mT @ R - torch.eye(16, dtype=torch.float64)).abs().max()) for _, own in parts for R in dense(own)
    )
    assert 1e-8 < off < 1e-2
    settings, adapter = merged("compose", parts)
    assert settings == OFT(block=4)
    (R,) = dense(adapter)
    assert (R.mT @ R - torch.eye(16, dtype=torch.float64)).abs().max() < 1e-12
    assert (R - dense(parts[0][1])[0] @ dense(parts[1][1])[0]).abs().max() < off
    with pytest.raises(OptionError, match="has not converged"):
        merged("karcher", [part(method, seed, size=0.5) for seed in (1, 2)])
    with pytest.raises(OptionError, match="has not converged"):
        merged("karcher", [part(HOFT(rank=6, inverse="neumann2"), seed) for seed in (1, 2)])


class NothingLarge(TorchDispatchMode):
    """Fails where an operation makes a tensor of so many numbers."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            assert not isinstance(tensor, Tensor) or tensor.numel() < self.limit, func
        return out


@every_rule
@pytest.mark.parametrize("method", ["hra", "hra, outputs", "hoft", "oft"])
def test_singular_values_stay_as_no_average_of_weights_leaves_them(name: str, method: str) -> None:
    parts = [part(METHODS[method], seed) for seed in (1, 2)]
    W = torch.randn(24, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    expected = torch.linalg.svdvals(W)
    found = torch.linalg.svdvals(merged(name, parts)[1].weight(W))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    # mergekit's "karcher" is the mean on the sphere that the flattened weights of one norm lie on.
    middle = parts[0][1].weight(W) + parts[1][1].weight(W)
    on_sphere = torch.linalg.svdvals(middle * W.norm() / middle.norm())
    assert ((on_sphere - expected) / expected).abs().max() > 0.01


@every_rule
def test_no_square_of_the_layer_is_formed(name: str) -> None:
    parts = three(HRA(rank=4), at=site(400, 10), size=0.02)
    with NothingLarge(400 * 100):
        merged(name, parts, [0.5, 0.2, 0.3])


@pytest.mark.parametrize(
    ("name", "parts", "weights", "message"),
    [
        ("karcher", [], [], "no adapter"),
        ("karcher", [part(HRA(rank=2), 1)], [0.0], "not all 0"),
        ("karcher", [part(HRA(rank=2), 1), part(HRA(rank=2), 2)], [2.0, -1.0], "of 0 or more"),
        ("compose", [part(HRA(rank=2), 1)], [math.nan], "finite"),
        ("karcher", [part(LoRA(rank=2), 1)], [1.0], "lora is none of them"),
        ("compose", [part(SHOFT(rank=2), 1)], [1.0], "shoft is none of them"),
        (
            "compose",
            [part(HRA(rank=2), 1), part(OFT(block=4), 1)],
            [1.0, 1.0],
            "one method, and here are hra and oft",
        ),
        ("compose", [part(HRA(rank=2), 1), part(HRA(rank=2, side="out"), 1)], [1.0, 1.0], "some the output"),
        ("compose", [part(HRA(rank=2), 1), part(HRA(rank=2), 1, site(8))], [1.0, 1.0], "different size, 8 and 16"),
        ("karcher", [part(OFT(block=4), 1), part(OFT(block=8), 1)], [1.0, 1.0], "different size, 4 and 8"),
        (
            "karcher",
            [part(OFT(block=4), 1), part(OFT(block=4), 1, site(8))],
            [1.0, 1.0],
            "numbers of blocks, 2 and 4",
        ),
        ("compose", [part(OFT(magnitude=True), 1)] * 2, [1.0, 1.0], "magnitude"),
        ("compose", [part(HRA(rank=3, start="random"), 1)], [0.5], "eigenvalue -1"),
        (
            "karcher",
            [part(HRA(rank=3, start="random"), 1), part(HRA(rank=2, start="random"), 1)],
            [1.0, 1.0],
            "determinant 1 and some -1",
        ),
        ("compose", [part(HOFT(rank=6), seed) for seed in (1, 2, 3)], [1.0] * 3, "hoft holds 16 at most"),
    ],
)
def test_what_cannot_be_merged_is_refused(name: str, parts: list[Part], weights: list[float], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        merged(name, parts, weights)


def test_rotations_too_far_apart_are_refused() -> None:
    one, opposite = of_columns(plane(0.4, 0, 1)), of_columns(plane(0.4 + math.pi, 0, 1))
    with pytest.raises(OptionError, match="too far apart"):
        merged("karcher", [one, opposite])
    with pytest.raises(OptionError, match="no convergence in 1 steps"):
        merged("karcher", three(HRA(rank=4)), steps=1)


def quarter_turns(settings: OFT) -> Part:
    """Blocks turned by 90 degrees: Q has the one number 1."""
    return settings, OFTAdapter(torch.ones(8, above_diagonal(2), dtype=torch.float64), 2)


def test_a_block_turned_by_180_degrees_has_no_cayley_transform() -> None:
    quarter = quarter_turns(OFT(block=2))
    with pytest.raises(OptionError, match="eigenvalue -1"):
        merged("compose", [quarter, quarter])
    settings, nearly = part(OFT(block=8), 1)
    V, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    with torch.no_grad():
        nearly.Q.add_(upper_of(1e5 * (V[:, :1] @ V[:, 1:2].mT - V[:, 1:2] @ V[:, :1].mT)))
    with pytest.raises(OptionError, match="too coarse"):
        merged("compose", [(settings, nearly), part(settings, 2, size=1e-9)])


def folder_of(name: str, folders: Sequence[Path], path: Path, weights: Sequence[float]) -> Path:
    """Adapter folders merged to a folder, without a model."""
    stored = [read_stored(folder) for folder in folders]
    found = rule(name)
    assert isinstance(found, RotationRule)
    parts = {}
    for layers in zip(*(stored_parts(one, None) for one in stored), strict=True):
        p, bare, _ = layers[0]
        own = [(one.settings[p], adapters[0]) for one, (_, _, adapters) in zip(stored, layers, strict=True)]
        parts[p] = (bare, *found.merge(bare, own, weights))
    header = stored[0].header
    assert header is not None
    return write_parts(path, parts, {}, stored[0].base, sites=header["sites"])


FILES: dict[str, Settings] = {
    "hra": HRA(rank=4),
    "hra, anchored": HRA(rank=3, start="anchored"),
    "hra, outputs": HRA(rank=2, side="out"),
    "hoft": HOFT(rank=4),
    "oft": OFT(block=4),
}


@pytest.mark.parametrize("method", FILES.values(), ids=FILES.keys())
def test_composed_files_compute_what_the_stacked_adapters_do(method: Settings, tmp_path: Path) -> None:
    folders = [isotune.save(adapted(stories(), method, seed=seed), tmp_path / f"{seed}") for seed in (1, 2)]
    model = isotune.load(isotune.load(stories(), folders[0], "a"), folders[1], "b")
    expected = output(isotune.use(model, "a", "b").eval())
    path = folder_of("compose", folders, tmp_path / "merged", [1.0, 1.0])
    loaded = isotune.load(stories(), path).eval()
    assert_same_output(output(loaded), expected)
    again = isotune.save(loaded, tmp_path / "again")
    assert read_stored(again).settings == read_stored(path).settings


@pytest.mark.parametrize("method", FILES.values(), ids=FILES.keys())
def test_the_mean_of_an_adapter_and_itself_survives_its_file(method: Settings, tmp_path: Path) -> None:
    model = adapted(stories(), method, ["q_proj", "down_proj"])
    folder = isotune.save(model, tmp_path / "one")
    path = folder_of("karcher", [folder, folder], tmp_path / "merged", [1.0, 2.0])
    assert_same_output(output(isotune.load(stories(), path).eval()), output(model))


def test_peft_loads_what_merging_wrote(tmp_path: Path) -> None:
    folders = [isotune.save(adapted(stories(), HRA(rank=2), seed=seed), tmp_path / f"{seed}") for seed in (1, 2)]
    for name in ("compose", "karcher"):
        path = folder_of(name, folders, tmp_path / name, [1.0, 1.0])
        assert_same_output(output(peft_load(stories(), path)), output(isotune.load(stories(), path).eval()))


def test_embeddings_and_convolutions_merge_too() -> None:
    for layer, method in itertools.product(
        (nn.Embedding(30, 24), nn.Conv2d(4, 24, 2)), (HRA(rank=2), OFT(block=4), ETHER())
    ):
        at = require_site(layer, "layer")
        parts = [part(method, seed, at) for seed in (1, 2)]
        W = at.weight.double()
        found = merged("compose", parts)[1]
        expected = parts[1][1].weight(parts[0][1].weight(W))
        torch.testing.assert_close(found.weight(W), expected, rtol=0, atol=1e-12)
