"""PEFT's HRA and BOFT with isotune's arithmetic: the same outputs, gradients, files and switches."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as peft_boft
from torch import Tensor, nn

import isotune
from isotune import IsotuneError
from isotune.adapters.peft import layers as peft_layers
from support import assert_same_output, files, minilm, move, output, stories, tokens

LLAMA = ["q_proj", "o_proj", "down_proj"]


def hra(rank: int = 4, start: bool = False, **options: Any) -> peft.HRAConfig:
    return peft.HRAConfig(r=rank, init_weights=start, **options)


def with_peft(model: nn.Module, *configs: peft.PeftConfig, seed: int = 0, size: float = 0.05) -> Any:
    """The model with one adapter of PEFT's for each config, all active, off their start."""
    torch.manual_seed(seed)
    names = ["default", "two", "three"][: len(configs)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT, about odd ranks
        model = peft.get_peft_model(model, configs[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
    model.base_model.set_adapter(names)
    return move(model, seed, size)


class Pixels(nn.Module):
    """Two convolutions and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).mean((2, 3)))


def pixels(*configs: peft.PeftConfig, **options: Any) -> Any:
    return with_peft(Pixels(), *configs, **options)


def fast_layers(model: nn.Module) -> int:
    return sum(type(m) in peft_layers.FAST.values() for m in model.modules())


def assert_same(model: Any, x: Tensor, tolerance: float = 1e-5, autocast: bool = False) -> None:
    """Outputs and all gradients of the accelerated model are those of PEFT's."""
    results = []
    fast = isotune.accelerate_peft(copy.deepcopy(model))
    assert fast_layers(fast) > 0
    assert fast_layers(model) == 0
    for one in (model, fast):
        v = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = one(v)
        y.float().square().sum().backward()
        grads = {name: p.grad for name, p in one.named_parameters() if p.grad is not None}
        results.append((y, {"x": v.grad, **grads}))
        one.zero_grad()
    (y, grads), (y_fast, grads_fast) = results
    assert y.dtype == y_fast.dtype
    assert_same_output(y_fast.float(), y.float(), tolerance)
    assert grads.keys() == grads_fast.keys()
    for name, grad in grads.items():
        assert_same_output(grads_fast[name].float(), grad.float(), 10 * tolerance)


CASES = {
    "one": [hra(4)],
    "odd": [hra(3)],
    "paired start": [hra(4, start=True)],
    "gram-schmidt": [hra(3, apply_GS=True)],
    "trained biases": [hra(4, bias="hra_only")],
    "several active": [hra(4), hra(3, apply_GS=True), hra(2)],
    "several ranks": [hra(2), hra(5)],
}
cases = pytest.mark.parametrize("configs", CASES.values(), ids=CASES)


@cases
@pytest.mark.parametrize("shape", [(3, 10), (2, 4, 10)], ids=["rows", "tokens"])
def test_linear_layers_keep_outputs_and_gradients(configs: list[Any], shape: tuple[int, ...]) -> None:
    for config in configs:
        config.target_modules = ["0", "2"]
    model = with_peft(nn.Sequential(nn.Linear(10, 7), nn.Tanh(), nn.Linear(7, 6, bias=False)), *configs)
    assert_same(model, torch.randn(shape))


@cases
@pytest.mark.parametrize("form", ["output", "weight"])
def test_convolutions_keep_outputs_and_gradients_in_either_form(
    configs: list[Any], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peft_layers, "cheapest", lambda *sizes: form)
    for config in configs:
        config.target_modules = ["first", "second"]
    assert_same(pixels(*configs), torch.randn(2, 3, 9, 8))


def test_gram_schmidt_from_equal_columns_keeps_what_peft_makes_of_the_rounding() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(10, 7)), hra(4, start=True, apply_GS=True, target_modules=["0"])
    )
    x = torch.randn(3, 10)
    expected = model(x)
    assert_same_output(isotune.accelerate_peft(model)(x), expected)


def test_half_precision_bases_and_autocast_agree_within_their_rounding() -> None:
    config = hra(4, target_modules=["first", "second", "head"])
    assert_same(with_peft(Pixels().to(torch.bfloat16), config), torch.randn(2, 3, 8, 8).to(torch.bfloat16), 0.01)
    assert_same(pixels(config), torch.randn(2, 3, 8, 8), 0.03, autocast=True)
    assert_same(with_peft(Pixels().double(), config).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64), 1e-12)


def test_models_train_to_the_same_weights() -> None:
    losses = []
    for accelerate in (False, True):
        model = with_peft(stories(), hra(4, start=True, target_modules=LLAMA), size=0.0)
        if accelerate:
            isotune.accelerate_peft(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        batch = tokens(model)
        for _ in range(4):
            loss = model(**batch, labels=batch["input_ids"]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[4:] == pytest.approx(losses[:4], rel=1e-4)
    assert losses[3] < losses[0]


def test_merging_disabling_and_switching_stay_those_of_peft() -> None:
    own = with_peft(minilm(), *(hra(rank, target_modules=["query", "value"]) for rank in (4, 2)))
    fast = isotune.accelerate_peft(copy.deepcopy(own))
    layer = "base_model.model.encoder.layer.0.attention.self.query"
    assert fast.get_submodule(layer).hra_u["two"].shape == (384, 2)
    for names in (["default"], ["two"], ["two", "default"]):
        for model in (own, fast):
            model.base_model.set_adapter(names)
        expected = output(own)
        assert_same_output(output(fast), expected)
        fast.merge_adapter()
        assert_same_output(output(fast), expected)
        with fast.disable_adapter(), own.disable_adapter():
            assert_same_output(output(fast), output(own))
        assert_same_output(output(fast), expected)
        if fast.get_submodule(layer).merged:
            fast.unmerge_adapter()
        assert_same_output(output(fast), expected, 1e-4)
    merged = fast.merge_and_unload()
    assert_same_output(output(merged), expected, 1e-4)
    assert all("peft" not in type(module).__module__ for module in merged.modules())


def test_saved_folder_is_the_same_to_the_byte_and_adapters_added_later_are_fast_too(tmp_path: Path) -> None:
    model = with_peft(stories(), hra(4, target_modules=LLAMA))
    model.save_pretrained(tmp_path / "before")
    isotune.accelerate_peft(model).save_pretrained(tmp_path / "after")
    assert files(tmp_path / "before") == files(tmp_path / "after")
    model.load_adapter(tmp_path / "after", "again")
    expected = output(model)
    model.set_adapter("again")
    assert torch.equal(output(model), expected)


def test_undo_copies_and_pickles_and_a_second_call_change_nothing_else() -> None:
    model = with_peft(stories(), hra(4, target_modules=LLAMA))
    classes, before = [type(m) for m in model.modules()], output(model)
    assert isotune.accelerate_peft(isotune.accelerate_peft(model)) is model
    fast = output(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fast_layers(copied) == fast_layers(model) == 15
        assert torch.equal(output(copied), fast)
    assert isotune.accelerate_peft(model, undo=True) is model
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(output(model), before)


def test_peft_s_lora_is_left_as_it_is() -> None:
    model = with_peft(stories(), peft.LoraConfig(r=4, target_modules=LLAMA))
    classes = [type(m) for m in model.modules()]
    isotune.accelerate_peft(model)
    assert [type(m) for m in model.modules()] == classes


@pytest.mark.parametrize(
    ("options", "why"),
    [({"dilation": 2}, "dilation"), ({"padding": 1, "padding_mode": "circular"}, "padding mode 'circular'"),
     ({"stride": (1, 2)}, "stride")],
)  # fmt: skip
def test_convolutions_that_peft_computes_otherwise_keep_its_results_and_are_named(
    options: dict[str, Any], why: str
) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3, **options), nn.Conv2d(4, 2, 1))
    model = with_peft(base, hra(4, target_modules=["0", "1"]))
    x = torch.randn(2, 3, 9, 9)
    before = model(x)
    with pytest.warns(UserWarning, match=rf"keep its arithmetic: base_model\.model\.0 \({why}[^;]*$") as said:
        isotune.accelerate_peft(model)
    assert len(said) == 1
    assert fast_layers(model) == 1
    assert_same_output(model(x), before)


def test_model_without_adapters_of_peft_is_refused() -> None:
    with pytest.raises(IsotuneError, match=r"peft\.get_peft_model"):
        isotune.accelerate_peft(stories())


def test_missing_peft_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.tuners_utils", None)
    with pytest.raises(IsotuneError, match=r"pip install isotune\[peft\]"):
        isotune.accelerate_peft(stories())


class Extension:
    """What PEFT's CUDA extension computes for more than one butterfly factor."""

    def forward(self, blocks: Tensor) -> list[Tensor]:
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    def backward(self, grad: Tensor, blocks: Tensor) -> list[Tensor]:
        b = blocks.shape[-1]
        parts = [grad[:, k : k + b, k : k + b] for k in range(0, grad.shape[-1], b)]
        return [torch.stack(parts, dim=1)]


@pytest.fixture(params=[True, False], ids=["extension", "no extension"])
def _extension(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Extension() if request.param else None
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: found)


def boft(block: int = 2, factors: int = 1, **options: Any) -> peft.BOFTConfig:
    return peft.BOFTConfig(boft_block_size=block, boft_n_butterfly_factor=factors, **options)


BOFTS = {
    "one": [boft(4)],
    "odd": [boft(3)],
    "factors": [boft(2, 2)],
    "trained biases": [boft(2, 2, bias="boft_only")],
    "several active": [boft(2, 2), boft(2, 2)],
    "several whose permutations PEFT mixes up": [boft(2, 2), boft(6, 2)],
    "dropout, which evaluation has not": [boft(2, 2, boft_dropout=0.5)],
}
bofts = pytest.mark.parametrize("configs", BOFTS.values(), ids=BOFTS)


@bofts
@pytest.mark.usefixtures("_extension")
@pytest.mark.parametrize("shape", [(3, 12), (2, 40, 12)], ids=["rows", "tokens"])
def test_boft_s_linear_layers_keep_outputs_and_gradients(configs: list[Any], shape: tuple[int, ...]) -> None:
    for config in configs:
        config.target_modules = ["0", "2"]
    model = with_peft(nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6, bias=False)), *configs, size=0.2)
    assert_same(model, torch.randn(shape))


@bofts
@pytest.mark.usefixtures("_extension")
def test_boft_s_convolutions_keep_outputs_and_gradients(configs: list[Any]) -> None:
    for config in configs:
        config.target_modules = ["0", "1"]
    base = nn.Sequential(nn.Conv2d(4, 12, 3, stride=2, padding=1), nn.Conv2d(12, 6, 1, bias=False))
    assert_same(with_peft(base, *configs, size=0.2), torch.randn(2, 4, 9, 8))


def test_boft_drops_pefts_own_blocks_while_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", lambda: None)
    model = with_peft(nn.Sequential(nn.Linear(12, 4)), boft(2, boft_dropout=0.5, target_modules=["0"]), size=0.5)
    fast, x = isotune.accelerate_peft(copy.deepcopy(model)), torch.randn(5, 12)
    results = []
    for one in (model.train(), fast.train()):
        torch.manual_seed(3)
        results.append(one(x))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], model.eval()(x))


def test_boft_in_half_precision_and_under_autocast_agrees_within_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", Extension)
    config = boft(2, 2, target_modules=["0"])
    assert_same(with_peft(nn.Sequential(nn.Linear(12, 8)), config), torch.randn(6, 12), 0.03, autocast=True)
    half = with_peft(nn.Sequential(nn.Linear(12, 8)).to(torch.bfloat16), config)
    assert_same(half, torch.randn(6, 12).to(torch.bfloat16), 0.03)


def test_boft_merges_saves_and_undoes_as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peft_boft, "get_fbd_cuda", Extension)
    model = with_peft(stories(), boft(4, 2, target_modules=["q_proj", "gate_proj"]))
    classes, expected = [type(m) for m in model.modules()], output(model)
    model.save_pretrained(tmp_path / "before")
    isotune.accelerate_peft(model).save_pretrained(tmp_path / "after")
    assert fast_layers(model) == 10
    assert files(tmp_path / "before") == files(tmp_path / "after")
    assert_same_output(output(model), expected)
    model.merge_adapter()
    assert_same_output(output(model), expected)
    model.unmerge_adapter()
    with model.disable_adapter():
        assert_same_output(output(model), output(stories()), 1e-4)
    isotune.accelerate_peft(model, undo=True)
    assert [type(m) for m in model.modules()] == classes


def test_oft_is_left_as_it_is() -> None:
    model = with_peft(stories(), peft.OFTConfig(oft_block_size=4, target_modules=LLAMA))
    classes = [type(m) for m in model.modules()]
    isotune.accelerate_peft(model)
    assert [type(m) for m in model.modules()] == classes
