"""What is particular to RandLoRA: a sum over random bases, in the paper's pairing and in PEFT's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft
from isotune.bare import bare
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.model.catalogue import linear_site
from support import adapted, minilm, output, stories

LAYERS = ["q_proj", "up_proj", "down_proj"]  # 64 x 64, 172 x 64 and 64 x 172
NAMES = "randlora_A", "randlora_B"


def randlora(**options: Any) -> isotune.Settings:
    return isotune.method("randlora", **{"rank": 3} | options)


def on_layer(n_in: int, n_out: int, **options: Any) -> tuple[Any, Tensor]:
    """An adapter off its start on a layer beside a larger one, and the change of its weight."""
    model = nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(11, 13))
    adapter = adapted(model, randlora(**options), ["0", "2"], size=0.3)[0].isotune["default"].double()
    W = bare(model[0], "weight").double()
    return adapter, (adapter.weight(W) - W).detach()


@pytest.mark.parametrize(("n_in", "n_out"), [(7, 10), (10, 7), (8, 8)])
@pytest.mark.parametrize("over_root", [False, True])
def test_change_is_the_papers_sum_over_the_bases(n_in: int, n_out: int, over_root: bool) -> None:
    adapter, change = on_layer(n_in, n_out, alpha=4.0, over_root=over_root)
    m, n = min(n_in, n_out), math.ceil(min(n_in, n_out) / 3)
    A, B = (adapter.shared[name] for name in NAMES)
    assert (A.shape, B.shape) == ((3, 1, 11), (13, 4, 3))
    A, B = A[:, 0, :m], B[: max(n_in, n_out)]
    scale = 4 / 3 / (math.sqrt(n) if over_root else 1)
    expected = scale * sum(B[:, j] @ adapter.Lambda[:, j].diag() @ A @ adapter.gamma[j].diag() for j in range(n))
    torch.testing.assert_close(change, expected.detach() if n_in <= n_out else expected.detach().mT)


@pytest.mark.parametrize(("n_in", "n_out"), [(7, 10), (10, 7)])
def test_pefts_pairing_takes_the_scales_of_another_basis_and_is_an_option(
    n_in: int, n_out: int, tmp_path: Path
) -> None:
    adapter, legacy = on_layer(n_in, n_out, legacy_pairing=True)
    _, paper = on_layer(n_in, n_out)
    assert (legacy - paper).norm() > 0.5 * paper.norm()
    n, m = adapter.gamma.shape
    A, B = (adapter.shared[name] for name in NAMES)
    expected = torch.zeros(max(n_in, n_out), m, dtype=torch.float64)
    for c in range(3 * n):
        row = adapter.Lambda[c // n, c % n] * A[c // n, 0, :m] * adapter.gamma[c % n]
        expected += 20 * torch.outer(B[: max(n_in, n_out), c // 3, c % 3], row).detach()
    torch.testing.assert_close(legacy, expected if n_in <= n_out else expected.mT)
    # And it is what PEFT computes from the same tensors.
    theirs = by_peft(
        nn.Sequential(nn.Linear(n_in, n_out), nn.ReLU(), nn.Linear(11, 13)),
        peft.RandLoraConfig(r=3, randlora_alpha=60, target_modules=["0", "2"]),
        tmp_path,
    )
    layer = theirs.base_model.model[0]
    layer.randlora_lambda["default"].data = adapter.Lambda.detach().float()
    layer.randlora_gamma["default"].data = adapter.gamma.detach().float()
    torch.testing.assert_close(layer.get_delta_weight("default").detach().double(), legacy, rtol=1e-5, atol=1e-5)


def test_change_is_of_full_rank_with_fewer_parameters_for_a_larger_rank() -> None:
    counts = []
    for rank in (2, 3, 6):
        adapter, change = on_layer(8, 9, rank=rank)
        assert torch.linalg.matrix_rank(change) == 8
        counts.append(sum(p.numel() for p in adapter.parameters()))
        assert counts[-1] == randlora(rank=rank).parameter_count(linear_site(8, 9))
    assert counts == [40, 33, 28]


@pytest.mark.parametrize("bases", ["sparse", "very sparse"])
def test_sparse_bases_are_of_full_rank_but_for_the_columns_of_a_without_an_entry(bases: str) -> None:
    adapter, change = on_layer(40, 50, rank=8, bases=bases)
    touched = (adapter.shared["randlora_A"][:, 0, :40] != 0).any(0)
    # A is one for all bases: what it leaves out, no base reaches.
    assert 0 < (~touched).sum() < 20
    assert torch.equal((change != 0).any(0), touched)
    assert torch.linalg.matrix_rank(change) == touched.sum()


@pytest.mark.filterwarnings("ignore:Specified to not save:UserWarning")
@profile(max_examples=4)
@given(
    st.integers(1, 70),
    st.floats(1, 9),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from(["uniform", "sparse", "very sparse"]),
)
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, rank: int, alpha: float, key: int, save: bool, bases: str
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    method = randlora(
        rank=rank, alpha=alpha, projection_seed=key, save_projection=save, bases=bases, legacy_pairing=True
    )
    assert_peft_loads(stories, method, folder / "one", targets=LAYERS, size=0.02)
    config = peft.RandLoraConfig(
        r=rank, randlora_alpha=alpha, projection_prng_key=key, save_projection=save, target_modules=LAYERS,
        sparse=bases == "sparse", very_sparse=bases == "very sparse",
    )  # fmt: skip
    model = assert_isotune_loads(stories, config, folder)
    assert model.model.layers[0].self_attn.q_proj.isotune.settings["default"] == method


def test_minilm_goes_both_ways(tmp_path: Path) -> None:
    method = randlora(rank=40, legacy_pairing=True)
    assert_peft_loads(minilm, method, tmp_path / "one", targets=["query"], size=0.005)
    config = peft.RandLoraConfig(r=40, randlora_alpha=8, target_modules=["query"])
    assert_isotune_loads(minilm, config, tmp_path)


@pytest.mark.parametrize(
    ("options", "reason"),
    [({}, "pairs RandLoRA's bases in another order"), ({"legacy_pairing": True, "over_root": True}, "root of the")],
)
def test_what_peft_cannot_express_is_saved_as_isotunes_own(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = adapted(stories(), randlora(**options), LAYERS, size=0.02)
    isotune.save(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "ISOTUNE_RANDLORA"
    assert reason in (tmp_path / "README.md").read_text()
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))


def test_bases_are_stored_once_and_in_half_precision_where_peft_stores_them_with_every_layer(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), randlora(legacy_pairing=True), LAYERS), tmp_path / "ours")
    config = peft.RandLoraConfig(r=3, target_modules=LAYERS)
    by_peft(stories(), config, tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / TENSORS) for name in ("ours", "theirs"))
    assert [name for name in ours if name.endswith(NAMES)] == ["base_model.randlora_A", "base_model.randlora_B"]
    assert ours["base_model.randlora_B"].dtype == torch.bfloat16
    assert torch.equal(ours["base_model.randlora_B"].float(), theirs["base_model.randlora_B"].float())
    assert sum(name.endswith("randlora_B") for name in theirs) == 16
