"""What is particular to BitFit and LayerNorm tuning: biases and norms, whosever they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads
from isotune.errors import IsotuneError, NoLowRankFormError, OptionError, TargetError
from support import adapted, assert_same_output, minilm, output, stories, tokens

LN = isotune.method("ln_tuning")
BITFIT = isotune.method("bitfit")


@pytest.mark.parametrize("make", [minilm, stories])
def test_the_norms_of_models_go_both_ways_with_peft(make: Any, tmp_path: Path) -> None:
    model = assert_peft_loads(make, LN, tmp_path / "ours", targets="norms", size=0.3)
    rows = isotune.describe(model)
    assert all(row.site.endswith("norm") or row.site.endswith("LayerNorm") for row in rows)
    assert len(rows) == sum(type(m).__name__.endswith("Norm") for m in make().modules())
    names = [name for name, m in make().named_modules() if type(m).__name__.endswith("Norm")]
    config = peft.LNTuningConfig(target_modules=names)
    assert_isotune_loads(make, config, tmp_path / "theirs")


@pytest.mark.parametrize(("make", "method", "targets"), [(minilm, BITFIT, "biased"), (stories, LN, "norms")])
def test_they_fold_into_a_plain_model_and_out_again(make: Any, method: Any, targets: str, tmp_path: Path) -> None:
    model = adapted(make(), method, targets, size=0.3)
    expected, base = output(model), output(make())
    assert not torch.allclose(expected, base, atol=1e-3)
    isotune.fold(model)
    assert_same_output(output(model), expected)
    isotune.unfold(model)
    assert torch.equal(output(model), expected)
    with isotune.disabled(model):
        assert torch.equal(output(model), base)
    isotune.fold(model, keep_base=False)
    assert {type(m) for m in model.modules()} == {type(m) for m in make().modules()}
    model.save_pretrained(tmp_path)
    assert_same_output(output(type(model).from_pretrained(tmp_path).eval()), expected)


def test_a_norm_of_a_models_own_runs_as_it_does_with_its_weight_exchanged() -> None:
    model = adapted(stories(), LN, "norms", size=0.5)
    norm = model.model.norm
    x = torch.randn(2, 5, 64)
    plain = transformers.models.llama.modeling_llama.LlamaRMSNorm(64, norm.variance_epsilon)
    plain.weight = nn.Parameter(norm.isotune["default"].w.detach())
    own = norm._parameters["weight"]
    assert torch.equal(norm(x), plain(x))
    assert norm._parameters["weight"] is own
    torch._dynamo.reset()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    assert_same_output(compiled(x), norm(x))
    compiled(x).square().sum().backward()
    assert norm.isotune["default"].w.grad.any()
    norm.base_class.forward, kept = _failing, norm.base_class.forward
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            norm(x)
    finally:
        norm.base_class.forward = kept
    assert norm._parameters["weight"] is own


def _failing(*_: Any) -> None:
    raise RuntimeError("out of memory")


def test_norms_that_scale_by_one_plus_their_weight_and_those_without_a_bias_keep_their_form() -> None:
    torch.manual_seed(0)
    config = transformers.GemmaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=40,
    )  # fmt: skip
    gemma = transformers.GemmaForCausalLM(config).eval()
    ids = {"input_ids": torch.arange(8)[None]}
    before = output(gemma, **ids)
    model = isotune.adapt(gemma, LN, "norms", seed=0)
    assert torch.equal(output(model, **ids), before)
    loss = model(**ids, labels=ids["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_biases_train_where_there_are_any_and_nothing_else_does() -> None:
    model = isotune.adapt(minilm(), BITFIT, "biased", seed=0)
    before = output(model)
    biases = {n: p for n, p in minilm().named_parameters() if n.endswith("bias") and ".layer." in n}
    rows = isotune.describe(model)
    assert {f"{row.site}.bias" for row in rows} == set(biases)
    assert sum(row.trainable for row in rows) == sum(p.numel() for p in biases.values())
    layer = model.encoder.layer[0].attention.self.query
    weight = layer.weight
    layer.isotune["default"].bias_change.data += 1
    assert torch.equal(layer.weight, weight)
    torch.testing.assert_close(layer.bias, layer._parameters["bias"] + 1)
    assert not torch.allclose(output(model), before, atol=1e-3)


def test_what_has_no_bias_or_is_no_norm_is_said(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"bitfit at 'model.layers.0.self_attn.q_proj': the layer has no bias"):
        isotune.adapt(stories(), BITFIT, ["q_proj"])
    with pytest.raises(TargetError, match="targets 'biased' match no layer"):
        isotune.adapt(stories(), BITFIT, "biased")
    with pytest.raises(TargetError, match=r"ln_tuning cannot adapt 'model.layers.0.self_attn.q_proj'.*norm"):
        isotune.adapt(stories(), LN, ["q_proj"])
    with pytest.raises(TargetError, match="LlamaRMSNorm"):
        isotune.adapt(stories(), isotune.LoRA(), "norms")
    model = adapted(minilm(), BITFIT, ["query"], size=0.3)
    with pytest.raises(NoLowRankFormError):
        isotune.export_lora(model, tmp_path / "lora")
    model = adapted(minilm(), LN, "norms", size=0.3)
    with pytest.raises(NoLowRankFormError):
        isotune.export_lora(model, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_scaling_and_shifting_is_in_weight_and_bias_and_sets_do_not_touch_each_other() -> None:
    model: Any = minilm()
    base = output(model)
    for seed, missing in enumerate(("no-image", "no-text")):
        adapted(model, isotune.method("ssf"), "biased", name=missing, seed=seed, size=0.3)
    found = {name: output(isotune.use(model, name)) for name in ("no-image", "no-text")}
    assert not torch.allclose(found["no-image"], found["no-text"], atol=1e-3)
    with isotune.disabled(model):
        assert torch.equal(output(model), base)
    isotune.use(model, "no-text")
    layer = model.encoder.layer[0].attention.self.query
    own = layer.isotune["no-text"]
    torch.testing.assert_close(layer.weight, own.gamma[:, None] * layer._parameters["weight"])
    torch.testing.assert_close(layer.bias, own.gamma * layer._parameters["bias"] + own.beta)
    before = {name: p.clone() for name, p in model.named_parameters() if "no-image" in name}
    isotune.use(model, "no-text")
    output_of = model(input_ids=torch.arange(8)[None]).last_hidden_state
    output_of.square().mean().backward()
    assert all(p.grad is None for name, p in model.named_parameters() if "no-text" not in name)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert_same_output(output(isotune.fold(model)), found["no-text"])
    plain = adapted(stories(), isotune.method("ssf"), "attention", size=0.3)
    assert all(row.trainable in (64, 32) for row in isotune.describe(plain))
    keys = set(stories().state_dict())
    assert set(isotune.fold(plain, keep_base=False).state_dict()) == keys


@pytest.mark.parametrize("kind", ["bert", "convolution"])
def test_rows_of_one_batch_have_sets_of_their_own(kind: str) -> None:
    torch.manual_seed(0)
    model: Any = minilm() if kind == "bert" else nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2))
    inputs = tokens(model, 3) if kind == "bert" else {"input": torch.randn(3, 3, 8, 8)}

    def run(rows: slice = slice(None)) -> torch.Tensor:
        with torch.no_grad():
            found = model(**{name: t[rows] for name, t in inputs.items()})
            return found if isinstance(found, torch.Tensor) else found[0]

    base = run()
    for seed, missing in enumerate(("no-image", "no-text")):
        adapted(
            model,
            isotune.method("ssf"),
            "biased" if kind == "bert" else ["0", "2"],
            name=missing,
            seed=seed,
            size=0.3,
        )
    names = ["no-text", None, "no-image"]
    mixed = run_with(model, names, run)
    for row, name in enumerate(names):
        alone = run(slice(row, row + 1)) if name and isotune.use(model, name) else base[row : row + 1]
        assert_same_output(mixed[row : row + 1], alone)
    half = isotune.route(model, torch.full((3, 2), 0.5), "no-image", "no-text")
    layer = next(m for m in half.modules() if hasattr(m, "isotune"))
    assert {*layer.isotune.active} == {"no-image", "no-text"}
    assert not torch.allclose(run(), mixed, atol=1e-3)
    with pytest.raises(IsotuneError, match="no adapter 'no-sound'"):
        isotune.use(model, rows=["no-sound", None, None])


def run_with(model: Any, names: list[str | None], run: Any) -> torch.Tensor:
    """The output for rows that use these adapters."""
    isotune.use(model, rows=names)
    return run()
