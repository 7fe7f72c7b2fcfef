"""Adapters on a model: attaching, switching, asking, removing, and models whose code reaches into their layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, IsotuneError, LoRA
from isotune.errors import OptionError, TargetError
from isotune.linalg.householder import unit_columns
from support import adapted, assert_same_output, assert_unchanged, minilm, move, output, snapshot, stories, tokens


def test_class_and_output_of_the_model_stay_what_they_were() -> None:
    model = stories()
    before = output(model)
    assert isotune.adapt(model, HRA(rank=4), "all-linear", seed=0) is model
    assert type(model) is transformers.LlamaForCausalLM
    assert isinstance(model, transformers.GenerationMixin)
    assert_same_output(output(model), before)
    assert not torch.equal(output(move(model)), before)


def test_only_the_newest_adapter_is_active_and_use_chooses_any_stack() -> None:
    model = stories()
    base = output(model)
    adapted(model, HRA(rank=4), name="one", seed=1)
    one = output(model)
    adapted(model, LoRA(rank=2), "all-linear", name="two", seed=2)
    two = output(model)
    assert not torch.equal(one, two)
    assert torch.equal(output(isotune.use(model, "one")), one)
    assert torch.equal(output(isotune.use(model, "two")), two)
    both = output(isotune.use(model, "one", "two"))
    assert not any(torch.equal(both, other) for other in (base, one, two))
    assert not torch.equal(output(isotune.use(model, "two", "one")), both)
    assert torch.equal(output(isotune.use(model)), base)
    assert not any(p.requires_grad for p in model.parameters())


def test_use_says_which_adapters_learn() -> None:
    model = adapted(adapted(stories(), HRA(rank=2), name="one"), LoRA(rank=2), name="two")

    def learning() -> set[str]:
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        return {"one" if ".one." in name else "two" for name in names}

    isotune.use(model, "one", "two")
    assert learning() == {"one", "two"}
    isotune.use(model, "one", "two", train=["two"])
    assert learning() == {"two"}
    isotune.use(model, "one", "two", train=False)
    assert learning() == set()


def test_disabled_is_the_bare_base_also_after_an_error() -> None:
    model = stories()
    base = output(model)
    changed = output(adapted(model, HRA(rank=4)))
    with isotune.disabled(model):
        assert torch.equal(output(model), base)
        with isotune.disabled(model):
            assert torch.equal(output(model), base)
        assert torch.equal(output(model), base)
    with pytest.raises(ZeroDivisionError), isotune.disabled(model):
        raise ZeroDivisionError
    assert torch.equal(output(model), changed)


def test_describe_has_a_row_for_each_adapter_on_each_layer_and_each_trained_module() -> None:
    model = minilm()
    base = sum(p.numel() for p in model.parameters())
    isotune.adapt(model, HRA(rank=4), ["query"], name="one", train_also=["pooler"])
    isotune.adapt(model, LoRA(rank=2), ["query", "value"], name="two")
    rows = isotune.describe(model)
    assert len(rows) == 6 + 1 + 12
    first = next(row for row in rows if row.adapter == "one")
    assert (first.site, first.method) == ("encoder.layer.0.attention.self.query", "hra")
    assert (first.trainable, first.share, first.active) == (4 * 384, 4 * 384 / base, False)
    (full,) = [row for row in rows if row.method == "full"]
    assert (full.site, full.trainable, full.active) == ("pooler", 384 * 384 + 384, False)
    assert all(row.active and row.trainable == 2 * 768 for row in rows if row.adapter == "two")
    assert isotune.describe(stories()) == []


def test_penalty_is_the_sum_over_the_active_adapters() -> None:
    model = stories()
    assert isotune.penalty(model) == 0
    adapted(model, HRA(rank=4, penalty=0.1), ["q_proj"], name="one")
    one = isotune.penalty(model)
    assert one > 0
    adapted(model, HRA(rank=4, penalty=0.2), ["q_proj"], name="two")
    two = isotune.penalty(model)
    isotune.use(model, "one", "two")
    torch.testing.assert_close(isotune.penalty(model), one + two)
    with isotune.disabled(model):
        assert isotune.penalty(model) == 0
    isotune.penalty(model).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_after_step_reaches_the_active_adapters_without_gradients() -> None:
    model = adapted(adapted(stories(), LoRA(rank=2), ["q_proj"], name="one"), LoRA(rank=2), ["v_proj"], name="two")
    called: list[bool] = []
    for module in model.modules():
        if hasattr(module, "after_step"):
            module.after_step = lambda progress: called.append(torch.is_grad_enabled())
    isotune.after_step(model)
    assert called == [False] * 5


def test_removing_one_adapter_leaves_the_others_and_removing_all_leaves_the_base() -> None:
    model = stories()
    before = snapshot(model)["modules"]
    base = output(model)
    one = output(adapted(model, HRA(rank=4), name="one"))
    adapted(model, LoRA(rank=2), "all-linear", name="two")
    isotune.use(model, "one", "two")
    isotune.remove(model, "two")
    assert torch.equal(output(model), one)
    assert {row.adapter for row in isotune.describe(model)} == {"one"}
    isotune.remove(model)
    assert torch.equal(output(model), base)
    assert snapshot(model)["modules"] == before
    with pytest.raises(IsotuneError, match="no adapter 'one' to remove; the model has: none"):
        isotune.remove(model, "one")


def test_unknown_adapter_is_named_with_the_nearest_and_all_there() -> None:
    model = adapted(adapted(stories(), HRA(rank=4), name="law"), HRA(rank=4), name="news")
    before = output(model)
    with pytest.raises(IsotuneError, match=r"no adapter 'new'.* Did you mean 'news'\? It has: law, news"):
        isotune.use(model, "law", "new")
    assert torch.equal(output(model), before)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"targets": ["nothing"]}, TargetError, "match no layer"),
        ({"targets": ["q_proj", "norm"]}, TargetError, "which cannot be adapted"),
        ({"settings": HRA(rank=100), "targets": ["o_proj"]}, OptionError, "hra at 'model.layers.0.self_attn.o_proj'"),
        ({"settings": LoRA(rank=40)}, OptionError, "rank 40 is larger than the layer: its smaller side is 32"),
        ({"overrides": {"nothing": {"rank": 2}}}, TargetError, "override 'nothing' matches none"),
        ({"overrides": {"q_proj": {"rnk": 2}}}, OptionError, "no option 'rnk'"),
        ({"train_also": ["nothing"]}, TargetError, "train_also names 'nothing', which is no module"),
        (
            {"train_also": ["self_attn"], "targets": ["down_proj"], "name": "one"},
            OptionError,
            "already has an adapter",
        ),
        ({"train_also": ["layers.0.self_attn"]}, TargetError, "an adapter is on it or inside it"),
        ({"name": ""}, OptionError, "not usable"),
        ({"name": "a.b"}, OptionError, "contain a dot"),
        ({"name": "keys"}, OptionError, "'keys' is not usable: .* has already"),
    ],
)
def test_error_in_adapt_leaves_the_model_as_it_was(arguments: dict[str, Any], error: Any, said: str) -> None:
    model = adapted(stories(), HRA(rank=4), ["q_proj"], name="one")
    model.get_input_embeddings().weight.requires_grad_()
    before = snapshot(model)
    with pytest.raises(error, match=said):
        isotune.adapt(model, **{"settings": HRA(rank=4), "targets": "attention", "name": "two", **arguments})
    assert_unchanged(model, before)


def test_overrides_change_the_options_of_some_targets() -> None:
    model = isotune.adapt(
        stories(), HRA(rank=4), "attention", overrides={"v_proj": {"rank": 6}, r".*\.0\..*": {"side": "out"}}
    )
    layers = model.model.layers
    assert layers[1].self_attn.v_proj.isotune.settings["default"] == HRA(rank=6)
    assert layers[1].self_attn.q_proj.isotune.settings["default"] == HRA(rank=4)
    assert layers[0].self_attn.q_proj.isotune.settings["default"] == HRA(rank=4, side="out")
    assert layers[1].self_attn.v_proj.isotune["default"].U.shape == (64, 6)


def test_start_of_a_layer_depends_on_the_seed_and_its_path_alone() -> None:
    one = isotune.adapt(stories(), HRA(rank=4), ["q_proj"], seed=5)
    two = isotune.adapt(stories(), HRA(rank=4), "all-linear", seed=5)
    other = isotune.adapt(stories(), HRA(rank=4), ["q_proj"], seed=6)
    U = [unit_columns(m.model.layers[0].self_attn.q_proj.isotune["default"].U) for m in (one, two, other)]
    torch.testing.assert_close(U[0], U[1])  # of a length that depends on how many there are
    assert not torch.equal(U[0], U[2])
    assert not torch.equal(U[0], one.model.layers[1].self_attn.q_proj.isotune["default"].U)
    torch.manual_seed(9)
    first = isotune.adapt(stories(), HRA(rank=4), ["q_proj"])
    second = isotune.adapt(stories(), HRA(rank=4), ["q_proj"])
    starts = [m.model.layers[0].self_attn.q_proj.isotune["default"].U for m in (first, second)]
    assert not torch.equal(*starts)


def test_modules_trained_in_full_are_copies_that_remove_takes_away() -> None:
    model = minilm()
    pooler, bits = model.pooler, {n: t.clone() for n, t in model.pooler.state_dict().items()}
    isotune.adapt(model, HRA(rank=4), ["query"], train_also=["pooler"], seed=0)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and n.startswith("pooler")}
    assert trained == {"pooler.isotune.default.dense.weight", "pooler.isotune.default.dense.bias"}
    before = model(**tokens(model)).pooler_output
    move(model)
    assert not torch.allclose(model(**tokens(model)).pooler_output, before)
    isotune.remove(model)
    assert model.pooler is pooler
    assert all(torch.equal(t, bits[n]) for n, t in pooler.state_dict().items())


def test_layers_inside_a_module_trained_in_full_get_no_adapter_also_where_a_suffix_names_it() -> None:
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50
    )
    model = transformers.BertForSequenceClassification(config)
    isotune.adapt(model, HRA(rank=2), ["dense"], train_also=["pooler"])
    assert {row.site for row in isotune.describe(model) if row.method == "hra"} == {
        f"bert.encoder.layer.0.{layer}" for layer in ("attention.output.dense", "intermediate.dense", "output.dense")
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "pooler" in name}
    assert trained == {"bert.pooler.isotune.default.dense.weight", "bert.pooler.isotune.default.dense.bias"}


def test_shared_layer_gets_one_adapter_and_both_places_feel_it() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(4, 2))
    isotune.adapt(model, HRA(rank=2), "all-linear", seed=0)
    assert model[0] is model[2]
    assert [row.site for row in isotune.describe(model)] == ["0"]
    move(model)
    isotune.remove(model)
    assert model[0] is model[2] is layer
