"""What is particular to SPLoRA and SPPaRA: where the change goes, what is left out, when, and what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import isotune
from isotune.adapters.sparse.splora import SPLoRA, SPLoRAAdapter
from isotune.errors import IsotuneError, OptionError
from isotune.sites import Site, require_site
from laws.suite import laws_of
from support import move


class Masked(SPLoRA):
    """An SPLoRA of which something is left out from the start, so that every law sees it."""

    name: ClassVar[str] = "masked_splora"

    outputs: str = "what it makes"
    inputs: str = "what it reads"
    keep: float = 1.0
    heads: int = 0

    @property
    def identity_at_start(self) -> bool:
        return False

    def build(self, site: Site, generator: torch.Generator) -> SPLoRAAdapter:
        adapter = super().build(site, generator)
        assert adapter.kept_out is not None
        assert adapter.kept_in is not None
        adapter.kept_out[-1] = adapter.kept_in[0] = False
        return adapter


test_law = laws_of(Masked)


def test_heads_of_a_transposed_weight_have_their_worth() -> None:
    site = require_site(Conv1D(4, 3), "layer")
    adapter = SPLoRA(rank=1, p=2.0).build(site, torch.Generator())
    halves = adapter.weight(site.weight).chunk(2)
    torch.testing.assert_close(adapter.worth(site, 2), torch.stack([rows.square().sum() for rows in halves]))


class Net(nn.Module):
    """Two convolutions with a batch norm, whose shift is not zero, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3, bias=False)
        nn.init.uniform_(self.bn.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.sigmoid(self.bn(self.conv1(x)))).mean((2, 3))


def net(name: str = "splora", **options: Any) -> Any:
    torch.manual_seed(0)
    options = ({"rank": 2} if name == "splora" else {}) | options
    return isotune.adapt(Net(), isotune.method(name, **options), ["conv1", "conv2"], seed=0)


def train(model: nn.Module, steps: range, of: int = 10) -> None:
    """Steps towards zero, batch norms in evaluation mode."""
    model.eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1)
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    for k in steps:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        isotune.after_step(model, (k + 1) / of, optimizer)


@pytest.mark.parametrize("name", ["splora", "sppara"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_change_stands_at_the_centre_of_the_kernel(name: str, groups: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, (3, 5), stride=2, padding=(2, 1), dilation=(1, 2), groups=groups, padding_mode="circular")
    model: Any = nn.Sequential(conv).double()
    x = torch.randn(2, 4, 8, 12, dtype=torch.float64)
    base = model(x)
    options = {"rank": 2} if name == "splora" else {}
    move(isotune.adapt(model, isotune.method(name, **options), "0", seed=0), size=0.5)
    adapter = model[0].isotune["default"]
    D = adapter.B @ adapter.A if name == "splora" else adapter.P
    assert tuple(D.shape) == (6, 4 // groups)
    # What the centre of every kernel reads, through a 1 x 1 convolution.
    padded = nn.functional.pad(x, (1, 1, 2, 2), mode="circular")
    centres = padded[:, :, 1 : 1 + 2 * base.shape[2] : 2, 4 : 4 + 2 * base.shape[3] : 2]
    beside = nn.functional.conv2d(centres, D[..., None, None], adapter.beta, groups=groups)
    torch.testing.assert_close(model(x), base + beside)


def test_what_does_not_fit_is_refused() -> None:
    for layer, options, reason in (
        (nn.Conv2d(4, 6, 2), {}, "has no centre"),
        (nn.Conv2d(4, 6, 3, groups=2), {"inputs": "a"}, "grouped convolution"),
        (nn.Linear(4, 6), {"outputs": "a", "heads": 4}, "heads=4 does not divide"),
        (nn.Linear(4, 6), {"rank": 5}, "rank 5 is larger"),
    ):
        with pytest.raises(OptionError, match=reason):
            isotune.adapt(nn.Sequential(layer), SPLoRA(**{"rank": 1, **options}), "0")
    uneven = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    isotune.adapt(uneven, SPLoRA(rank=1, outputs="all"), ["0", "1"], overrides={"0": {"outputs": "all"}})
    with pytest.raises(IsotuneError, match="'all' differ in how many"):
        isotune.after_step(uneven)
    with pytest.raises(OptionError, match="must be before"):
        SPLoRA(start=0.5, end=0.5)


def test_a_rank_that_is_a_share_is_one_at_least_and_the_papers_start_is_near_the_base() -> None:
    site = require_site(nn.Linear(16, 20), "layer")
    assert [SPLoRA(rank_share=share).rank_at(site) for share in (0.001, 0.1, 0.4)] == [1, 2, 8]
    adapter: Any = SPLoRA(rank_share=0.001, init_range=1e-4).build(site, torch.Generator().manual_seed(0))
    assert adapter.A.shape == (1, 16)
    assert 0 < float(adapter.B.detach().abs().max()) <= 1e-4


@pytest.mark.parametrize("name", ["splora", "sppara"])
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_channels_go_by_the_norm_of_adapted_rows_on_schedule_and_for_good(name: str, p: float) -> None:
    model = net(name, keep=0.25, start=0.2, end=0.7, p=p)
    makes, reads = (model.get_submodule(path).isotune["default"] for path in ("conv1", "conv2"))
    assert reads.kept_out is None
    assert makes.kept_in is None
    base = [model.get_submodule(path)._parameters["weight"].clone() for path in ("conv1", "conv2")]
    counts, before = [], makes.kept_out.clone()
    for k in range(10):
        train(model, range(k, k + 1))
        counts.append(int(makes.kept_out.sum()))
        assert torch.equal(makes.kept_out, reads.kept_in)
        assert not (makes.kept_out & ~before).any()
        D = (makes.B @ makes.A if name == "splora" else makes.P).detach()
        rows = base[0].clone()
        rows[:, :, 1, 1] += D
        worth = rows.flatten(1).norm(p, dim=1)
        if counts[-1] < int(before.sum()) and before.all():  # the first choice was made of all
            assert float(worth[makes.kept_out].min()) >= float(worth[~makes.kept_out].max())
        before = makes.kept_out.clone()
        assert not model.conv1.weight[~before].any()
        assert not model.conv2.weight[:, ~before].any()
        assert not model.conv1.bias[~before].any()
    done = [min(max((k / 10 - 0.2) / 0.5, 0), 1) for k in range(1, 11)]
    assert counts == [round(8 * (0.25 + 0.75 * (1 - t) ** 3)) for t in done]
    assert counts[0] == 8
    assert counts[-1] == 2
    for path, weight in zip(("conv1", "conv2"), base, strict=True):
        assert torch.equal(model.get_submodule(path)._parameters["weight"], weight)


def test_what_stands_between_has_no_say_and_a_reader_that_does_not_follow_is_found() -> None:
    x = torch.randn(2, 3, 5, 5)
    for follows in (True, False):
        model = net(keep=0.5)
        train(model, range(10))
        left = model.conv1.isotune["default"].kept_out
        if not follows:
            model.conv2.isotune["default"].kept_in.fill_(True)
        before = model(x)
        with torch.no_grad():
            model.bn.bias[~left] = 3.0
        assert torch.equal(model(x), before) is follows


def test_pruning_what_is_merged_is_merging_what_is_pruned() -> None:
    model, pruned = net(keep=0.5), net(keep=0.5)
    for one in (model, pruned):
        move(one, size=0.2)
    isotune.after_step(pruned)
    left = pruned.conv1.isotune["default"].kept_out
    assert int(left.sum()) == 4
    isotune.fold(model, keep_base=False)
    isotune.fold(pruned, keep_base=False)
    with torch.no_grad():
        model.conv1.weight[~left] = model.conv1.bias[~left] = 0
        model.conv2.weight[:, ~left] = 0
    for merged, own in zip(model.state_dict().values(), pruned.state_dict().values(), strict=True):
        torch.testing.assert_close(own, merged, rtol=1e-6, atol=1e-7)


def test_training_and_evaluation_compute_the_same() -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 5))
    move(isotune.adapt(model, SPLoRA(rank=2), ["0", "1"], seed=0), size=0.3)
    isotune.after_step(model)
    x = torch.randn(3, 8)
    trained = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), trained)
        torch.testing.assert_close(isotune.fold(model)(x), trained)


@pytest.mark.parametrize("name", ["splora", "sppara"])
def test_what_is_left_out_is_not_stored(name: str, tmp_path: Path) -> None:
    model = net(name, keep=0.25)
    train(model, range(10))
    isotune.save(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    numbers = sum(t.numel() for key, t in stored.items() if "kept" not in key)
    left = 2
    expected = {
        "splora": (2 * (3 + left) + left) + 2 * (left + 4),  # r (|m_in| + |m_out|) + |m_out|, and conv2 without bias
        "sppara": (3 * left + left) + left * 4,
    }
    assert numbers == expected[name]
    assert sum(t.numel() for key, t in stored.items() if "kept" in key) == 2  # 8 bits each
    torch.manual_seed(0)
    loaded = isotune.load(Net(), tmp_path, trainable=True).eval()
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(loaded(x), model(x))


def test_layers_in_no_group_keep_all_unless_their_own_outputs_are_named() -> None:
    for overrides, left in ({}, 6), ({"0": {"outputs": "alone"}}, 3):
        model: Any = isotune.adapt(nn.Sequential(nn.Linear(8, 6)), SPLoRA(rank=2), "0", overrides=overrides)
        isotune.after_step(model)
        assert int(model[0].weight.any(1).sum()) == left
