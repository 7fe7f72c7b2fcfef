"""One batch whose rows use different adapters: equal to running each row with its own."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import isotune
from isotune import HRA, IsotuneError, LoRA, Settings
from isotune.adapters.contract import WeightAdapter
from isotune.sites import Site
from packed import pack
from support import STORIES, adapted, assert_same_output, move, output, stories

ROWS = ["a", "b", "a", None, "c", "b"]
METHODS: dict[str, list[Settings]] = {
    "hra": [HRA(rank=4), HRA(rank=2), HRA(rank=3, strict=True)],
    "hra out": [HRA(rank=4, side="out"), HRA(rank=2, side="out"), HRA(rank=1, side="out", start="random")],
    "lora": [LoRA(rank=4), LoRA(rank=1, alpha=3), LoRA(rank=2, rslora=True, dropout=0.5)],
}
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear, rows": (lambda: nn.Linear(12, 8), lambda: torch.randn(6, 12)),
    "linear, tokens": (lambda: nn.Linear(12, 8, bias=False), lambda: torch.randn(6, 5, 12)),
    "linear, more": (lambda: nn.Linear(12, 8), lambda: torch.randn(6, 2, 3, 12)),
    "gpt2_conv1d": (lambda: transformers.pytorch_utils.Conv1D(8, 12), lambda: torch.randn(6, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, groups=2), lambda: torch.randn(6, 4, 9)),
    "conv3d": (lambda: nn.Conv3d(2, 5, 2, padding=1), lambda: torch.randn(6, 2, 3, 4, 3)),
    "conv2d": (
        lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, padding_mode="circular"),
        lambda: torch.randn(6, 4, 5, 7),
    ),
    "conv2d, groups": (lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2), lambda: torch.randn(6, 4, 7, 5)),
    "embedding": (lambda: nn.Embedding(9, 8, padding_idx=0), lambda: torch.randint(9, (6, 5))),
    "embedding, rows": (lambda: nn.Embedding(9, 8), lambda: torch.randint(9, (6,))),
}
methods = pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
layers = pytest.mark.parametrize("layer", LAYERS)


def three(model: nn.Module, settings: list[Settings], targets: Any) -> Any:
    for seed, (name, method) in enumerate(zip("abc", settings, strict=True)):
        adapted(model, method, targets, name=name, seed=seed, size=0.3)
    return model


def grads(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@methods
@layers
def test_mixed_batch_equals_each_row_alone_in_values_and_gradients(settings: list[Settings], layer: str) -> None:
    make, batch = LAYERS[layer]
    model, x = three(nn.Sequential(make()).double(), settings, ["0"]), batch()
    x = x.double() if x.is_floating_point() else x
    alone, expected = [], {}
    for i, name in enumerate(ROWS):
        isotune.use(model, *([name] if name else []))
        y = model(x[i : i + 1])
        alone.append(y.detach())
        if name:
            for key, grad in grads(model, (i + 1) * y.sin().sum()).items():
                expected[key] = expected.get(key, 0) + grad
    assert isotune.use(model, rows=ROWS) is model
    y = model(x)
    assert_same_output(y, torch.cat(alone), 1e-12)
    got = grads(model, torch.arange(1, 7, dtype=torch.float64) @ y.sin().flatten(1).sum(1))
    assert got.keys() == expected.keys()
    for key, grad in got.items():
        assert_same_output(grad, expected[key], 1e-10)


@methods
def test_llama_writes_each_row_s_own_story(settings: list[Settings]) -> None:
    model = three(stories(), settings, "all-linear")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    rows = ["a", "b", None, "c", "a"]
    alone = []
    for name in rows:
        isotune.use(model, *([name] if name else []))
        alone.append(model.generate(**prompt, **options)[0].tolist())
    assert len({tuple(story) for story in alone}) > 2
    isotune.use(model, rows=rows)
    batch = {key: value.repeat(len(rows), 1) for key, value in prompt.items()}
    assert model.generate(**batch, **options).tolist() == alone


def test_rows_last_until_the_next_use_and_disabled_means_the_bare_base() -> None:
    model = stories()
    x = {"input_ids": torch.arange(5, 25).view(4, 5)}
    base = output(model, **x)
    adapted(model, HRA(rank=4), name="a")
    one = output(model, **x)
    isotune.use(model, rows=["a", None, "a", None])
    mixed = output(model, **x)
    assert_same_output(mixed[::2], one[::2])
    assert_same_output(mixed[1::2], base[1::2])
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied, **x), mixed)
    with isotune.disabled(model):
        assert torch.equal(output(model, **x), base)
    assert torch.equal(output(model, **x), mixed)
    assert torch.equal(output(isotune.use(model, "a"), **x), one)
    assert torch.equal(output(isotune.use(model, rows=[None] * 4), **x), base)
    adapted(isotune.use(model, rows=["a"] * 4), HRA(rank=2), name="b")
    assert model.model.layers[0].self_attn.q_proj.isotune.routing is None


def test_adapters_on_different_layers_mix() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    adapted(adapted(model, LoRA(rank=2), ["0"], name="a"), LoRA(rank=3), ["1"], name="b", seed=1)
    x = torch.randn(2, 6)
    first, second = isotune.use(model, "a")(x)[:1], isotune.use(model, "b")(x)[1:]
    assert_same_output(isotune.use(model, rows=["a", "b"])(x), torch.cat([first, second]))


def test_mixed_batches_run_on_packed_layers_in_half_precision_and_under_autocast() -> None:
    x = {"input_ids": torch.arange(5, 35).view(6, 5)}
    for settings in METHODS.values():
        packed = three(pack(stories(), "torchao"), settings, "all-linear")
        half = three(stories().to(torch.bfloat16), settings, "attention")
        for model, tolerance in ((packed, 1e-4), (half, 0.05)):
            alone = [
                output(isotune.use(model, *([n] if n else [])), input_ids=x["input_ids"][i : i + 1])
                for i, n in enumerate(ROWS)
            ]
            got = output(isotune.use(model, rows=ROWS), **x)
            assert got.dtype == alone[0].dtype
            assert_same_output(got.float(), torch.cat(alone).float(), tolerance)
            with torch.autocast("cpu", torch.bfloat16):
                assert_same_output(output(model, **x).float(), torch.cat(alone).float(), 0.1)


@methods
def test_compiled_mixed_batch_equals_the_eager_one(settings: list[Settings]) -> None:
    model = three(nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8)), settings, ["0", "1"])
    isotune.use(model, rows=ROWS)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(6, 3, 12)
    assert_same_output(compiled(x), model(x))


def test_each_adapter_of_a_batch_learns_from_its_own_rows_only() -> None:
    model = three(nn.Sequential(nn.Linear(12, 8)), METHODS["hra"], ["0"])
    isotune.use(model, rows=["a", "b", "c", None], train=["a", "c"])
    x = torch.randn(4, 12)
    found = grads(model, model(x)[[0, 3]].sum())
    assert {name for name, grad in found.items() if grad.any()} == {"0.isotune.a.U"}
    assert not model[0].isotune["b"].U.requires_grad
    assert isotune.describe(model)[1].active


@pytest.mark.parametrize("x", [torch.randn(3, 12), torch.randn(1, 6, 12), torch.randn(6)])
def test_batch_of_another_size_than_the_rows_is_an_error(x: Tensor) -> None:
    model = isotune.use(three(nn.Sequential(nn.Linear(12, 8)), METHODS["lora"], ["0"]), rows=ROWS)
    with pytest.raises(IsotuneError, match=r"given 6 rows, but a Linear got an input of shape .* no batch of 6"):
        model(x)


class Dense(Settings):
    """W' = W + D."""

    name: ClassVar[str] = "dense"
    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    learning_rate: ClassVar[float] = 1e-3
    formula: ClassVar[str] = "n_in * n_out"

    def build(self, site: Site, generator: torch.Generator) -> DenseAdapter:
        return DenseAdapter(torch.zeros(site.out_features, site.in_features))

    def parameter_count(self, site: Site) -> int:
        return site.in_features * site.out_features


class DenseAdapter(WeightAdapter):
    method = "dense"

    def __init__(self, D: Tensor) -> None:
        super().__init__()
        self.D = nn.Parameter(D)

    def weight(self, W: Tensor) -> Tensor:
        return W + self.D.to(W.dtype)


def test_rows_that_cannot_share_a_batch_are_refused_and_nothing_changes() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 4))
    adapted(model, HRA(rank=4), ["0"], name="in")
    adapted(model, HRA(rank=4, side="out"), ["0"], name="out")
    adapted(model, LoRA(rank=2, dropout=0.5), ["0"], name="lora")
    adapted(model, Dense(), ["0"], name="dense")
    adapted(model, LoRA(rank=2), ["0"], name="full", train_also=["1"])
    isotune.use(model, "in")
    x = torch.randn(2, 12)
    before = model(x)
    refused = {
        r"at '0' are 'in' \(hra, before\) and 'out' \(hra, behind\)": ["in", "out"],
        r"'in' \(hra, before\) and 'lora' \(lora, beside\)": ["in", "lora"],
        "the method 'dense', which has no thin factors": ["dense", None],
        "'full' trains '1' in full": ["full", "lora"],
        r"no adapter 'inn' on this model. Did you mean 'in'\?": ["inn", "in"],
    }
    for said, rows in refused.items():
        with pytest.raises(IsotuneError, match=said):
            isotune.use(model, rows=rows)
    with pytest.raises(IsotuneError, match="not both"):
        isotune.use(model, "in", rows=["out", None])
    with pytest.raises(IsotuneError, match="has dropout"):
        isotune.use(model.train(), rows=["lora", None])
    assert torch.equal(model(x), before)


def test_what_needs_one_weight_is_refused_while_rows_are_set_and_saving_one_adapter_works(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(12, 8))
    three(model, METHODS["hra"], ["0"])
    isotune.use(model, rows=["a", "b"])
    x = torch.randn(2, 12)
    before = model(x)
    refused: dict[str, Callable[[], Any]] = {
        "not one weight to fold.*isotune.use": lambda: isotune.fold(model),
        "not one weight to export": lambda: isotune.export_lora(model, tmp_path / "lora"),
        "rows of a batch use the adapter 'a'": lambda: isotune.remove(model, "a"),
        "say which one to save": lambda: isotune.save(model, tmp_path / "none"),
    }
    for said, call in refused.items():
        with pytest.raises(IsotuneError, match=said):
            call()
    assert model[0].weight is model[0]._parameters["weight"]
    isotune.remove(model, "c")
    assert torch.equal(model(x), before)
    isotune.save(model, tmp_path / "b", name="b")
    again = isotune.load(copy.deepcopy(isotune.remove(model)), tmp_path / "b")
    assert_same_output(move(again, size=0.0)(x)[1], before[1])
