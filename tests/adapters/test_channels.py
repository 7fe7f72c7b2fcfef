"""Which layers make channels and which read them, found in models of several families."""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from isotune.adapters.sparse.channels import channel_groups
from isotune.model.targets import find_targets
from isotune.sites import require_site
from support import resnet20

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
Found = list[tuple[list[str], list[str], int]]


def groups(model: nn.Module, targets: Any = "all-linear", head_size: int | None = None) -> Found:
    """Makers, readers and heads."""
    sites = {path: require_site(layer, path) for path, layer in find_targets(model, targets).items()}
    return [(list(g.makers), list(g.readers), g.heads) for g in channel_groups(sites, head_size)]


def under(prefix: str, found: Found) -> Found:
    """Those whose layers are all there, without the prefix."""
    return [
        ([p.removeprefix(prefix) for p in makers], [p.removeprefix(prefix) for p in readers], heads)
        for makers, readers, heads in found
        if all(p.startswith(prefix) for p in (*makers, *readers))
    ]


def test_a_bert_has_heads_and_mlps() -> None:
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL))
    found = groups(model, head_size=4)
    assert len(found) == 4
    names = [f"attention.self.{name}" for name in ("query", "key", "value")]
    assert under("encoder.layer.1.", found) == [
        (names, ["attention.output.dense"], 4),
        (["intermediate.dense"], ["output.dense"], 0),
    ]
    assert len(groups(model)) == 2  # no heads without their size
    assert groups(model, "query-value", 4) == []


def test_a_llama_has_gated_mlps_and_heads_with_common_keys() -> None:
    config = transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **SMALL)
    found = groups(transformers.LlamaForCausalLM(config), head_size=4)
    assert len(found) == 4
    assert under("model.layers.0.", found) == [
        ([f"self_attn.{x}_proj" for x in "qkv"], ["self_attn.o_proj"], 2),
        (["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"], 0),
    ]
    assert groups(transformers.LlamaForCausalLM(config), ["gate_proj", "up_proj"]) == []


def test_a_vision_transformer_has_both() -> None:
    model = transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))
    found = groups(model, head_size=4)
    assert sorted(heads for _, _, heads in found) == [0, 0, 4, 4]
    assert all(len(readers) == 1 for _, readers, _ in found)


def test_a_resnet_has_the_inner_channels_of_its_blocks() -> None:
    found = groups(resnet20(), lambda path, module: isinstance(module, nn.Conv2d))
    expected = [f"layer{k}.{n}." for k in (1, 2, 3) for n in range(3)]
    assert found == [([f"{block}conv1"], [f"{block}conv2"], 0) for block in expected]


def test_layers_of_a_sequential_are_a_chain_without_grouped_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1),
        nn.Flatten(), nn.Linear(4, 6), nn.Linear(6, 5),
    )  # fmt: skip
    found = groups(model, lambda path, module: isinstance(module, nn.Conv2d | nn.Linear))
    assert found == [(["0"], ["2"], 0), (["6"], ["7"], 0)]


def test_what_is_ambiguous_is_in_no_group_and_order_does_not_matter() -> None:
    meta = nn.ModuleDict({"w1": nn.Linear(4, 8), "w2": nn.Linear(8, 4), "w3": nn.Linear(4, 8)})
    assert groups(nn.ModuleList([meta]), ["w1", "w2", "w3"]) == [(["0.w1", "0.w3"], ["0.w2"], 0)]
    twice = nn.ModuleDict({"a": nn.Linear(4, 8), "b": nn.Linear(8, 4), "c": nn.Linear(8, 4)})
    assert groups(nn.ModuleList([twice]), ["a", "b", "c"]) == []
    for first, second in (("up", "down"), ("down", "up")):  # of two blocks
        layers = {"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}
        across = nn.ModuleList([nn.ModuleDict({name: layers[name]}) for name in (first, second)])
        assert groups(across, ["up", "down"]) == []
    gap = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 1), "conv3": nn.Conv2d(4, 4, 1)})
    assert groups(nn.ModuleList([gap]), ["conv1", "conv3"]) == []
    mixer = nn.ModuleDict({**{f"{x}_proj": nn.Linear(4, 8) for x in "qkv"}, "o_proj": nn.Linear(8, 4)})
    found = groups(nn.ModuleList([mixer]), ["q_proj", "k_proj", "v_proj", "o_proj"], 2)
    assert found == [([f"0.{x}_proj" for x in "qkv"], ["0.o_proj"], 4)]
    assert groups(nn.ModuleList([mixer]), ["q_proj", "k_proj", "v_proj", "o_proj"]) == []
    square = nn.ModuleDict({"one": nn.Linear(4, 4), "two": nn.Linear(4, 4)})
    assert groups(nn.ModuleList([square]), ["one", "two"]) == []
