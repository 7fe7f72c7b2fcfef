"""Statistics in files beside their adapter, and second moments of weights from those of an adapter's factors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from isotune import HRA, LoRA
from isotune.checkpoint.files import STATISTICS
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.statistics.second_moment import check_informative, from_factors, second_moments
from isotune.statistics.stored import RankOne, StoredStatistic, write_statistic
from support import adapted, files, output, stories

PATH = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter's folder with a Fisher information beside it."""
    isotune.save(adapted(stories(), LoRA(rank=2), ["q_proj"]), tmp_path / "adapter")
    values = {PATH: torch.rand(64, 64), "odd": RankOne.of(torch.rand(3, 5)), "norm.weight": torch.rand(7)}
    write_statistic(tmp_path / "adapter", "fisher", values, examples=8)
    return tmp_path / "adapter"


def altered(folder: Path, values: dict[str, Tensor] | None = None, **header: object) -> Path:
    """The same file with other tensors, or another header."""
    from safetensors import safe_open

    file = folder / STATISTICS["fisher"]
    with safe_open(file, framework="pt") as opened:
        kept = json.loads(opened.metadata()["isotune"])
    save_file({**load_file(file), **(values or {})}, file, metadata={"isotune": json.dumps({**kept, **header})})
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    V, norm = torch.rand(3, 5), torch.rand(4)
    write_statistic(tmp_path, "second_moment", {"a.b": V, "c": RankOne.of(V), "norm.weight": norm}, steps=3)
    found = StoredStatistic(tmp_path, "second_moment")
    assert found.made == {"steps": 3}
    assert found.shapes == {"a.b": (3, 5), "c": (3, 5), "norm": (4,)}
    for path, wanted in {"a.b": V, "a.b.weight": V, "norm.weight": norm, "norm": norm}.items():
        assert path in found
        assert found.of(path).equal(wanted)
    assert found.of("c").shape == (3, 5)
    assert "d" not in found


def test_rank_one_is_exact_for_rank_one_and_keeps_the_sums_of_any_matrix() -> None:
    V = torch.outer(torch.rand(6), torch.rand(9)) * 1e-24
    torch.testing.assert_close(RankOne.of(V).dense() * 1e24, V * 1e24)
    V = torch.rand(6, 9) * 1e-24
    for dim in (0, 1):
        torch.testing.assert_close(RankOne.of(V).dense().sum(dim) * 1e24, V.sum(dim) * 1e24)
    assert RankOne.of(torch.zeros(2, 3)).dense().equal(torch.zeros(2, 3))


def test_adapter_with_statistics_loads_and_a_new_one_takes_them_away(folder: Path) -> None:
    model = isotune.load(stories(), folder)
    isotune.save(model, folder)  # the same tensors: still theirs
    assert (folder / "fisher.safetensors").is_file()
    StoredStatistic(folder, "fisher").of(PATH)
    (folder / "notes.txt").write_text("mine")
    other = adapted(stories(), LoRA(rank=2), ["q_proj"], seed=5)
    isotune.save(other, folder)
    assert set(files(folder)) == {"README.md", "adapter_config.json", "adapter_model.safetensors", "notes.txt"}
    assert torch.equal(output(isotune.load(stories(), folder).eval()), output(other))


def test_statistic_of_other_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), ["q_proj"], seed=5), tmp_path / "other")
    (tmp_path / "other" / "fisher.safetensors").write_bytes((folder / "fisher.safetensors").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"made of other weights than those in .*isotune statistics RUN --fisher"
    ):
        StoredStatistic(tmp_path / "other", "fisher")


def test_what_cannot_be_read_is_said(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no second_moment.safetensors; train with save_second_moments"):
        StoredStatistic(folder, "second_moment")
    found = StoredStatistic(folder, "fisher")
    with pytest.raises(CheckpointError, match=r"has no fisher of 'model.layers.0.self_attn.k_proj'.* Did you mean"):
        found.of("model.layers.0.self_attn.k_proj")
    before = (folder / "fisher.safetensors").read_bytes()
    damages: list[tuple[str, dict[str, Tensor], str]] = [
        (PATH, {PATH: -torch.ones(64, 64)}, "negative or not finite"),
        ("odd", {"odd//rows": torch.full((3,), torch.inf)}, "negative or not finite"),
        (PATH, {PATH: torch.ones(64, 32)}, r"of shape \(64, 32\) .* says \(64, 64\); the file is damaged"),
    ]
    for path, values, message in damages:
        found = StoredStatistic(altered(folder, values), "fisher")
        with pytest.raises(CheckpointError, match=message):
            found.of(path)
        (folder / "fisher.safetensors").write_bytes(before)
    for header, message in (({"format": 9}, "format version 9"), ({"kind": "second_moment"}, "no statistic")):
        with pytest.raises(CheckpointError, match=message):
            StoredStatistic(altered(folder, **header), "fisher")
        (folder / "fisher.safetensors").write_bytes(before)
    (folder / "fisher.safetensors").write_bytes(before[: len(before) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        StoredStatistic(folder, "fisher")
    save_file({"a": torch.ones(1)}, folder / "fisher.safetensors")
    with pytest.raises(CheckpointError, match="no statistic that isotune wrote"):
        StoredStatistic(folder, "fisher")


def test_what_cannot_be_written_leaves_the_old_file(folder: Path, tmp_path: Path) -> None:
    before = files(folder)
    for value in (torch.tensor([torch.nan]), torch.tensor([-1.0])):
        with pytest.raises(CheckpointError, match="negative or not finite"):
            write_statistic(folder, "fisher", {"a": value})
    with pytest.raises(CheckpointError, match="there is no folder"):
        write_statistic(tmp_path / "none", "fisher", {"a": torch.ones(1)})
    assert files(folder) == before


def test_moments_of_factors_give_those_of_the_weight_under_the_two_assumptions() -> None:
    r, c, s = torch.rand(7).double(), torch.rand(5).double(), 1.7
    V = 1e-9 * torch.outer(r, c)
    B, A = torch.randn(7, 2).double(), torch.randn(2, 5).double()
    of_B, of_A = s**2 * V @ A.square().mT, s**2 * B.square().mT @ V
    torch.testing.assert_close(from_factors(B, A, s, of_B, of_A).dense(), V, rtol=1e-9, atol=0)
    rows_only = from_factors(B, A, s, of_B, None).dense()
    torch.testing.assert_close(rows_only / rows_only.sum(), (r / r.sum())[:, None].expand(7, 5) / 5)
    # At the start B = 0, and A has seen no gradient yet.
    start = from_factors(0 * B, A, s, of_B, 0 * of_A).dense()
    assert start.isfinite().all()
    torch.testing.assert_close(start, rows_only)
    assert not from_factors(0 * B, A, s, 0 * of_B, 0 * of_A).dense().any()


def trained(model: nn.Module, steps: int = 3, beta: float = 0.9) -> tuple[torch.optim.Optimizer, dict[str, Tensor]]:
    """Adam after some steps of drawn gradients, and what its second moments should be."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.8, beta))
    sums = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for _ in range(steps):
        for n, p in parameters.items():
            p.grad = torch.randn_like(p)
            sums[n] = beta * sums[n] + (1 - beta) * p.grad.square()
        optimizer.step()
    return optimizer, {n: v / (1 - beta**steps) for n, v in sums.items()}


def test_full_model_has_its_own_moments_bias_corrected() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    optimizer, expected = trained(model)
    dense, thin = second_moments(model, optimizer, compress=False), second_moments(model, optimizer)
    assert dense.keys() == expected.keys() == thin.keys()
    for name, wanted in expected.items():
        torch.testing.assert_close(dense[name], wanted)
        value = thin[name]
        assert isinstance(value, RankOne) == (wanted.dim() == 2)
        if isinstance(value, RankOne):
            torch.testing.assert_close(value.rows, wanted.sum(1))
            torch.testing.assert_close(value.columns, wanted.sum(0))


@pytest.mark.parametrize("method", ["lora", "loraplus", "pissa"])
def test_adapter_and_modules_trained_in_full(method: str) -> None:
    model = isotune.adapt(stories(), isotune.method(method, rank=2), ["q_proj"], train_also=["model.norm"], seed=0)
    optimizer, expected = trained(model)
    check_informative(model)
    found = second_moments(model, optimizer)
    assert len(found) == 6
    torch.testing.assert_close(found["model.norm.weight"], expected["model.norm.isotune.default.weight"])
    value = found[PATH]
    assert isinstance(value, RankOne)
    assert value.shape == (64, 64)
    of_B = expected[f"{PATH}.isotune.default.B"]
    torch.testing.assert_close(value.rows / value.rows.sum(), (of_B.mean(1) / of_B.mean(1).sum()).double())


def test_moments_that_say_nothing_of_the_weight_are_refused() -> None:
    model = isotune.adapt(stories(), HRA(rank=2), ["q_proj"])
    optimizer, _ = trained(model)
    for call in (lambda: check_informative(model), lambda: second_moments(model, optimizer)):
        with pytest.raises(
            OptionError, match=r"of the hra adapter on .*use its Fisher information: .*collect_fisher"
        ):
            call()
    plain = nn.Linear(2, 2)
    with pytest.raises(IsotuneError, match=r"no second moments .*train with Adam"):
        second_moments(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
