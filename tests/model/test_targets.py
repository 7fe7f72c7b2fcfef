"""Which layers the presets and patterns find, on the shapes of real architectures."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA
from isotune.errors import TargetError
from isotune.model.targets import find_targets
from support import minilm, stories

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

_OF_WHISPER = ("layers", "attention_heads", "ffn_dim")


def model(name: str) -> nn.Module:
    """A model without weights."""
    with torch.device("meta"):
        if name == "bert":
            return transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL))
        if name == "llama":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, vocab_size=50))
        if name == "gpt2":
            return transformers.GPT2LMHeadModel(
                transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50)
            )
        if name == "deberta":
            positions: dict[str, Any] = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
            config = transformers.DebertaV2Config(**SMALL, **positions, share_att_key=True)
            return transformers.DebertaV2ForSequenceClassification(config)
        if name == "whisper":
            sizes: dict[str, Any] = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in _OF_WHISPER}
            return transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(d_model=16, **sizes))
        if name == "t5":
            config = transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=50)
            return transformers.T5ForConditionalGeneration(config)
        return transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, image_size=32, patch_size=16))


# The endings of the layers found, and how many layers there are in all.
EXPECTED = {
    ("bert", "attention"): ({"query", "key", "value", "attention.output.dense"}, 8),
    ("bert", "query-value"): ({"query", "value"}, 4),
    ("bert", "mlp"): ({"intermediate.dense", "output.dense"}, 4),
    ("bert", "all-linear"): ({"query", "key", "value", "dense"}, 12),
    ("llama", "attention"): ({"q_proj", "k_proj", "v_proj", "o_proj"}, 8),
    ("llama", "query-value"): ({"q_proj", "v_proj"}, 4),
    ("llama", "mlp"): ({"gate_proj", "up_proj", "down_proj"}, 6),
    ("llama", "all-linear"): ({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}, 14),
    ("gpt2", "attention"): ({"attn.c_attn", "attn.c_proj"}, 4),
    ("gpt2", "mlp"): ({"mlp.c_fc", "mlp.c_proj"}, 4),
    ("gpt2", "all-linear"): ({"c_attn", "c_proj", "c_fc"}, 8),
    ("deberta", "attention"): ({"query_proj", "key_proj", "value_proj", "attention.output.dense"}, 8),
    ("deberta", "query-value"): ({"query_proj", "value_proj"}, 4),
    ("deberta", "mlp"): ({"intermediate.dense", "output.dense"}, 4),
    ("t5", "attention"): ({"Attention.q", "Attention.k", "Attention.v", "Attention.o"}, 24),
    ("t5", "query-value"): ({"Attention.q", "Attention.v"}, 12),
    ("t5", "mlp"): ({"wi", "wo"}, 8),
    ("t5", "all-linear"): ({"q", "k", "v", "o", "wi", "wo"}, 32),
    ("vit", "query-value"): ({"q_proj", "v_proj"}, 4),
    ("vit", "attention"): ({"q_proj", "k_proj", "v_proj", "o_proj"}, 8),
    ("vit", "mlp"): ({"fc1", "fc2"}, 4),
}


@pytest.mark.parametrize(("name", "preset"), EXPECTED, ids=lambda value: value)
def test_preset_finds_the_layers_of_the_architecture(name: str, preset: str) -> None:
    endings, count = EXPECTED[name, preset]
    found = find_targets(model(name), preset)
    assert len(found) == count
    assert all(any(path.endswith(ending) for ending in endings) for path in found), list(found)
    assert all(any(path.endswith(ending) for path in found) for ending in endings), list(found)


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "deberta", "t5", "vit"])
def test_presets_leave_out_head_and_embeddings_and_split_all_linear(name: str) -> None:
    base = model(name)
    attention, mlp, every = (set(find_targets(base, preset)) for preset in ("attention", "mlp", "all-linear"))
    assert attention | mlp == every
    assert not attention & mlp
    assert not any("classifier" in path or "lm_head" in path or "embed" in path or "pooler" in path for path in every)


def test_query_value_of_a_packed_projection_names_the_matrix_to_take() -> None:
    gpt2 = model("gpt2")
    with pytest.raises(TargetError, match=r"are one matrix here: name it, targets=\['c_attn'\], or .* 'attention'"):
        find_targets(gpt2, "query-value")
    assert len(find_targets(gpt2, ["c_attn"])) == 2
    with pytest.raises(TargetError, match=r"targets=\['in_proj_weight'\]"):
        find_targets(nn.TransformerEncoderLayer(8, 2), "query-value")


def test_a_projection_that_is_none_of_an_attention_is_not_taken_for_a_packed_one() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj = nn.Linear(4, 8)

    with pytest.raises(TargetError) as error:
        find_targets(nn.Sequential(Mixer()), "query-value")
    assert "one matrix" not in str(error.value)


def test_what_was_asked_for_is_no_hint() -> None:
    with pytest.raises(TargetError) as error:
        find_targets(nn.Sequential(nn.Conv2d(1, 1, 1)), "all-linear")
    assert "Did you mean" not in str(error.value)


def plain() -> nn.Module:
    """A model with no structure to go by."""
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.Conv2d(2, 2, 1), nn.Linear(6, 3))


def test_all_linear_without_blocks_is_all_but_the_last() -> None:
    assert list(find_targets(plain(), "all-linear")) == ["0", "2"]
    assert list(find_targets(nn.Sequential(nn.Linear(2, 2)), "all-linear")) == ["0"]


class Mixed(nn.Module):
    """A block of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 6), nn.Linear(6, 4)


def test_a_sequence_of_modules_of_one_class_is_a_stack_of_blocks_as_in_timms_models() -> None:
    model = nn.ModuleDict(
        {"blocks": nn.Sequential(Mixed(), Mixed()), "head": nn.Linear(4, 2), "more": nn.Linear(4, 2)}
    )
    layers = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("fc1", "fc2")]
    assert list(find_targets(model, "all-linear")) == layers
    assert list(find_targets(model, "blocks", kinds={"block"})) == ["blocks.0", "blocks.1"]
    isotune.adapt(model, HRA(rank=2), "all-linear")
    assert list(find_targets(model, "all-linear")) == layers


def test_a_sequence_of_layers_is_no_stack_of_blocks_with_adapters_or_without() -> None:
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "head": nn.Linear(4, 2)})
    for _ in range(2):
        with pytest.raises(TargetError, match="'blocks' match no layer"):
            find_targets(model, "blocks", kinds={"block"})
        isotune.adapt(model, HRA(rank=2), ["0", "1"], name=f"a{len(list(model.modules()))}")


def test_suffixes_match_whole_names_only() -> None:
    llama = model("llama")
    assert len(find_targets(llama, ["q_proj"])) == 2
    assert list(find_targets(llama, "layers.1.self_attn.q_proj")) == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(TargetError, match="match no layer"):
        find_targets(llama, ["proj"])


def test_regular_expression_matches_the_whole_path() -> None:
    found = find_targets(model("llama"), r".*layers\.1\.(self_attn|mlp)\.(q|up)_proj")
    assert list(found) == ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(TargetError, match=r"no valid regular expression"):
        find_targets(model("llama"), r"(q_proj")


def test_callable_sees_path_and_module_and_exclude_takes_every_form() -> None:
    bert = model("bert")
    wide = find_targets(bert, lambda path, module: isinstance(module, nn.Linear) and module.out_features == 24)
    assert list(wide) == [f"bert.encoder.layer.{i}.intermediate.dense" for i in range(2)]
    for exclude in ("attention", ["query", "key", "value", "attention.output.dense"], r".*\.attention\..*"):
        assert set(find_targets(bert, "all-linear", exclude)) == set(find_targets(bert, "mlp"))
    assert set(find_targets(bert, "all-linear", lambda path, module: ".0." in path)) == {
        path for path in find_targets(bert, "all-linear") if ".1." in path
    }


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (
            ["qurey"],
            ["['qurey'] match no layer", "query, key, value, dense", "Did you mean 'query'?", "Presets: att"],
        ),
        ("atention", ["'atention'", "Did you mean 'attention'?"]),
        (r"nothing\..*", ["match no layer", "all-linear"]),
        (lambda path, module: False, ["match no layer"]),
        (["LayerNorm"], ["a LayerNorm, which cannot be adapted", "GPT-2's Conv1D, convolutions of one to"]),
    ],
)
def test_target_that_matches_nothing_usable_is_an_error_that_lists_what_is_there(
    targets: Any, said: list[str]
) -> None:
    bert = model("bert")
    with pytest.raises(TargetError) as error:
        isotune.adapt(bert, HRA(), targets)
    assert all(words in str(error.value) for words in said), error.value


def test_model_without_adaptable_layers_says_so() -> None:
    with pytest.raises(TargetError, match="It has no layer that can be adapted"):
        find_targets(nn.Sequential(nn.ReLU()), "attention")


def test_modules_trained_in_full_are_no_targets() -> None:
    found = find_targets(model("bert"), lambda path, module: isinstance(module, nn.Linear), trained=["classifier"])
    assert "classifier" not in found
    assert "bert.pooler.dense" in found


def deberta() -> nn.Module:
    """DeBERTaV3-base, without values."""
    config = transformers.DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=128100,
        relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
        pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False, max_relative_positions=-1,
    )  # fmt: skip
    with torch.device("meta"):
        return transformers.DebertaV2Model(config)


def llama2() -> nn.Module:
    """LLaMA2-7B, without values."""
    config = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
    )
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(config)


def count(base: nn.Module, targets: str, method: str, **options: Any) -> int:
    isotune.adapt(base, isotune.method(method, **options), targets, seed=0)
    return sum(p.numel() for p in base.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        ("lora", {"rank": 8}, 1_327_104),  # the papers' 1.33 M
        ("hra", {"rank": 8}, 663_552),  # the paper's 0.66 M
        # The papers say 0.79 M and 0.75 M. A block of size b has b (b - 1) / 2 free numbers, and BOFT a scale for
        # each output: over 82,944 inputs and as many outputs that is 7.5 and 2 * 3.5 + 1 each. 0.75 M are 2 * 4 + 1,
        # half of what two factors store as whole blocks; 0.79 M are between 9 and 10 for each input.
        ("oft", {"block": 16}, 622_080),
        ("boft", {"block": 8, "factors": 2}, 663_552),
    ],
)
def test_parameters_on_every_linear_layer_of_deberta_v3_base(
    method: str, options: dict[str, Any], trained: int
) -> None:
    assert count(deberta(), "all-linear", method, **options) == trained


@pytest.mark.parametrize(
    ("method", "options", "trained"),
    [
        ("lora", {"rank": 32}, 16_777_216),  # the papers' 0.25 %
        ("hra", {"rank": 32}, 8_388_608),  # the paper's 0.12 %
        # The paper's 0.13 % and 0.12 % would be 33 and 31 numbers for each input; blocks of these sizes have 7.5, and
        # 2 * 3.5 + 1 with the scale: its runs must have stored more, or targeted more layers.
        ("oft", {"block": 16}, 1_966_080),
        ("boft", {"block": 8, "factors": 2}, 2_097_152),
    ],
)
def test_parameters_on_query_and_value_of_llama2_7b(method: str, options: dict[str, Any], trained: int) -> None:
    base = llama2()
    total = sum(p.numel() for p in base.parameters())
    assert count(base, "query-value", method, **options) == trained
    rows = isotune.describe(base)
    assert len(rows) == 64
    assert sum(row.share for row in rows) == pytest.approx(trained / total)
    assert all(re.search(r"\.(q|v)_proj$", row.site) for row in rows)
    if method in ("lora", "hra"):
        assert round(100 * trained / total, 2) == {"lora": 0.25, "hra": 0.12}[method]


WITHOUT_AN_MLP: dict[str, tuple[str, Any]] = {
    "bert": ("mlp", r"bert\.encoder\.layer\.\d+\.output"),  # attention.output has its name
    "whisper": ("mlp", ["fc2"]),
    "whisper's decoder": ("attention", ["self_attn", "encoder_attn"]),
}


@pytest.mark.parametrize("name", WITHOUT_AN_MLP)
def test_where_no_module_is_the_mlp_the_error_says_what_to_name(name: str) -> None:
    preset, instead = WITHOUT_AN_MLP[name]
    tiny = model(name.removesuffix("'s decoder"))
    named = f"targets={instead!r}" if isinstance(instead, list) else f"targets=r'{instead}'"
    with pytest.raises(TargetError, match=rf"no one module in '.*\.0' holds all .* of its {preset}") as raised:
        find_targets(tiny, preset, kinds={"block"})
    assert named in str(raised.value)
    found = find_targets(tiny, instead, kinds={"block"})
    assert len(found) == {"bert": 2, "whisper": 4, "whisper's decoder": 6}[name]
    assert not [path for path in found if "attention.output" in path]


@pytest.mark.parametrize("method", ["ssf", "bitfit"])
@pytest.mark.parametrize("targets", [["0", "1"], "norms", r"\d"])
def test_norms_of_a_convolutional_net_lead_to_train_also(method: str, targets: Any) -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4))

    norms = ["1"] if targets == ["0", "1"] else ["1", "3"]
    with pytest.raises(TargetError, match=re.escape(f"can be trained in full: train_also={norms!r}")):
        isotune.adapt(net(), isotune.method(method), targets)
    adapted = isotune.adapt(net(), isotune.method(method), ["0"], train_also=norms)
    assert {name for name in norms for p in adapted.get_submodule(name).parameters() if p.requires_grad} == set(norms)


def test_presets_name_what_a_method_goes_on() -> None:
    """Blocks for methods that stand beside one, norms, and layers that have a bias; by default the method's own."""
    branch = isotune.method("houlsby", rank=2)
    expected = {"attention": "self_attn", "mlp": "mlp"}
    for preset, name in expected.items():
        rows = isotune.describe(isotune.adapt(stories(), branch, preset))
        assert [row.site for row in rows] == [f"model.layers.{k}.{name}" for k in range(5)]
    assert [row.site for row in isotune.describe(isotune.adapt(minilm(), branch, "attention"))] == [
        f"encoder.layer.{k}.attention" for k in range(6)
    ]
    for method, preset in (("houlsby", "mlp"), ("ln_tuning", "norms"), ("hra", "attention")):
        chosen, asked = (isotune.adapt(stories(), isotune.method(method), t) for t in (None, preset))
        assert [row.site for row in isotune.describe(chosen)] == [row.site for row in isotune.describe(asked)]
