"""What is particular to Lily: which layers share what, weights of experts by token or by text, and PEFT's batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from both_ways import by_peft, through_peft
from isotune.adapters.budget import nearest_to, total_parameters
from isotune.bare import bare
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import adapted, assert_same_output, move, output, stories

LAYERS = ["q_proj", "v_proj", "down_proj"]  # 64 x 64, 32 x 64 and 64 x 172, in five layers
IDS = torch.randint(5, 500, (2, 12), generator=torch.Generator().manual_seed(3))


def lily(**options: Any) -> isotune.Settings:
    return isotune.method("lily", **{"rank": 4, "experts": 3, "stride": 2} | options)


def adapters(model: nn.Module) -> dict[str, Any]:
    return {path: layer.isotune["default"] for path, layer in adapted_layers(model)}


def change_by_hand(adapter: Any, x: Tensor, text: bool) -> Tensor:
    """The change for one text x (n, in), token by token and expert by expert."""
    A, B, R = adapter.shared["lily_A"], adapter.shared["lily_B"], adapter.R
    z = [A @ row for row in x]
    p = [torch.softmax(R @ one, 0) for one in z]
    if text:
        p = [sum(p) / len(p)] * len(p)  # type: ignore[list-item]
    rows = [sum(p[n][e] * (B[e].mT @ z[n]) for e in range(len(B))) for n in range(len(x))]
    return adapter.settings.scale * torch.stack(rows)  # type: ignore[arg-type]


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_every_token_gets_the_experts_by_its_weights_or_those_of_its_text(routing: str) -> None:
    model = adapted(stories(), lily(routing=routing, scale=0.5), LAYERS, size=0.3)
    for path, layer in adapted_layers(model):
        adapter, W = layer.isotune["default"], bare(layer, "weight")
        x = torch.randn(2, 5, W.shape[1])
        expected = torch.stack([one @ W.mT + change_by_hand(adapter, one, routing == "sequence") for one in x])
        torch.testing.assert_close(layer(x), expected, msg=path)
        torch.testing.assert_close(layer(x[0]), x[0] @ W.mT + change_by_hand(adapter, x[0], False), msg=path)


def test_layers_of_a_name_share_their_experts_and_neighbours_among_them_a() -> None:
    model = adapted(stories(), lily(), LAYERS, size=0.2)
    for twin in (model, copy.deepcopy(model), copy.deepcopy(model).double()):
        found = adapters(twin)
        for name in LAYERS:
            own = [adapter for path, adapter in found.items() if path.endswith(name)]
            A = [id(adapter.shared["lily_A"]) for adapter in own]
            assert [A[0], A[0], A[2], A[2], A[4]] == A
            assert len(set(A)) == 3
            assert len({id(adapter.shared["lily_B"]) for adapter in own}) == 1
        assert len({id(adapter.shared["lily_B"]) for adapter in found.values()}) == 3
    expected = output(model)
    state = model.state_dict()
    assert sum("lily_A" in key for key in state) == 9
    assert sum("lily_B" in key for key in state) == 3
    other = adapted(stories(), lily(), LAYERS, seed=3)
    other.load_state_dict(state)
    assert torch.equal(output(other), expected)


def test_what_trains_is_counted_once_and_sized_to_a_budget() -> None:
    model = isotune.adapt(stories(), lily(), LAYERS)
    sites = {path: require_site(layer, path) for path, layer in adapted_layers(model)}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    by_hand = 4 * (3 * (64 + 64 + 172) + 3 * (64 + 32 + 64) + 15 * 3)
    assert trained == total_parameters(lily(), sites) == by_hand
    assert trained == sum(row.trainable for row in isotune.describe(model))
    assert nearest_to(by_hand, lily(rank=1), sites) == lily(rank=4)
    groups = isotune.parameter_groups(model, lr=1.0, algorithm="muon")
    assert sum(p.numel() for group in groups for p in group["params"]) == by_hand


def test_a_step_is_taken_by_all_layers_that_share(tmp_path: Path) -> None:
    model = isotune.adapt(stories(), lily(), LAYERS, seed=0)
    isotune.save(move(model, size=0.1), tmp_path / "before")
    loaded = isotune.load(stories(), tmp_path / "before", trainable=True)
    for one in (model, loaded):
        optimizer = torch.optim.SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one(input_ids=IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in one.parameters() if p.requires_grad)
        optimizer.step()
    for path, adapter in adapters(model).items():
        for name in ("lily_A", "lily_B"):
            assert torch.equal(adapter.shared[name], adapters(loaded)[path].shared[name])
    isotune.save(model, tmp_path / "after")
    assert torch.equal(output(isotune.load(stories(), tmp_path / "after").eval()), output(model))


def test_padding_has_no_part_in_the_mean_of_a_text() -> None:
    model = adapted(stories(), lily(routing="sequence"), LAYERS, size=1.0)
    alone = output(model, input_ids=IDS[1:, :7])
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    unaware = output(model, input_ids=IDS, attention_mask=mask)[1:, :7]
    assert not torch.allclose(unaware, alone, atol=1e-3)
    isotune.tokens(model, mask)
    assert_same_output(output(model, input_ids=IDS, attention_mask=mask)[1:, :7], alone)
    isotune.tokens(model, torch.zeros_like(mask))  # a row of padding alone
    assert output(model, input_ids=IDS).isfinite().all()


def test_generating_with_a_cache_is_the_pass_over_the_text_where_tokens_choose() -> None:
    model = adapted(stories(), lily(), LAYERS, size=0.3)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(IDS[:1], **options)
    assert torch.equal(cached, model.generate(IDS[:1], use_cache=False, **options))


TARGETS: dict[str, Any] = {
    "names": ["q_proj", "v_proj", "down_proj"],
    "one pattern": r".*\.(q|o)_proj",  # one group, for both are 64 x 64
    "paths": [f"model.layers.{k}.mlp.down_proj" for k in range(4)],
    "all linear": "all-linear",
}


def trained_by_peft(config: peft.LilyConfig, folder: Path) -> Any:
    """PEFT's model, far enough off its start that the router counts; it is saved to the folder."""
    theirs = move(by_peft(stories(), config, folder), size=0.3)
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("targets", TARGETS)
def test_batches_of_one_text_are_those_of_peft_both_ways(targets: str, tmp_path: Path) -> None:
    config = peft.LilyConfig(r=4, stride_A=2, num_B=3, scaling=0.7, target_modules=TARGETS[targets])
    theirs = trained_by_peft(config, tmp_path / "theirs")
    ours = isotune.load(stories(), tmp_path / "theirs").eval()
    found = adapters(ours)
    for name, module in theirs.base_model.model.named_modules():
        if name in found:  # who shares with whom is the same
            assert found[name].shared["lily_A"].equal(module.lily_A["default"].weight)
    distinct = {id(adapter.shared[name]) for adapter in found.values() for name in ("lily_A", "lily_B")}
    shared = [p for name, p in theirs.named_parameters() if ".lily_A." in name or ".lily_B." in name]
    assert len(distinct) == len(shared)
    for row in IDS:
        expected = output(theirs, input_ids=row[None])
        assert_same_output(output(ours, input_ids=row[None]), expected)
    assert not torch.allclose(expected, output(stories(), input_ids=row[None]), atol=1e-3)
    isotune.save(ours, tmp_path / "ours")
    again = through_peft(stories(), tmp_path / "ours")
    assert_same_output(output(again, input_ids=row[None]), expected)


@pytest.mark.parametrize("targets", [LAYERS, "all-linear"])
def test_peft_gives_each_layer_what_it_had(targets: Any, tmp_path: Path) -> None:
    model = adapted(stories(), lily(routing="sequence"), targets, size=0.2)
    isotune.save(model, tmp_path)
    assert_same_output(output(through_peft(stories(), tmp_path), input_ids=IDS[:1]), output(model, input_ids=IDS[:1]))


def test_a_text_does_not_depend_on_its_neighbours_as_it_does_in_peft(tmp_path: Path) -> None:
    config = peft.LilyConfig(r=4, num_B=3, target_modules=LAYERS)
    theirs = trained_by_peft(config, tmp_path / "theirs")
    ours = isotune.load(stories(), tmp_path / "theirs").eval()
    alone, both = (output(theirs, input_ids=ids)[:1] for ids in (IDS[:1], IDS))
    assert not torch.allclose(alone, both, atol=1e-3)
    assert_same_output(output(ours, input_ids=IDS)[:1], alone)
    by_token = adapted(stories(), lily(), ["q_proj"], size=0.3)
    layer, x = by_token.model.layers[0].self_attn.q_proj, torch.randn(3, 1, 64)
    isotune.save(by_token, tmp_path / "token")
    assert "ISOTUNE_LILY" in (tmp_path / "token" / CONFIG).read_text()
    peer = peft.tuners.lily.layer.Linear(nn.Linear(64, 64), "default", 4, peft.LilyConfig(r=4, num_B=3))
    adapter = layer.isotune["default"]
    with torch.no_grad():
        peer.base_layer.weight.copy_(bare(layer, "weight"))
        peer.base_layer.bias.zero_()
        peer.lily_A["default"].weight.copy_(adapter.shared["lily_A"])
        peer.lily_B["default"].weight.copy_(adapter.shared["lily_B"].flatten(0, 1))
        peer.lily_router["default"].weight.copy_(adapter.R)
    together = layer(x)
    for row, one in zip(x, together, strict=True):  # a batch of one token is PEFT's, whatever the routing
        assert_same_output(one[None], peer(row[None]))
    assert not torch.allclose(together, peer(x), atol=1e-3)


def test_a_file_of_more_than_ten_layers_has_the_order_of_the_model(tmp_path: Path) -> None:
    def deep() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.ModuleDict({"proj": nn.Linear(6, 6)}) for _ in range(12)]
        model = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        model.forward = lambda x: [x := layer["proj"](x).tanh() for layer in layers][-1]  # type: ignore[assignment]
        return model

    config = peft.LilyConfig(r=2, stride_A=5, num_B=2, target_modules=["proj"])
    theirs = by_peft(deep(), config, tmp_path)
    ours = isotune.load(deep(), tmp_path)
    A = [id(adapters(ours)[f"layers.{k}.proj"].shared["lily_A"]) for k in range(12)]
    assert [A.index(one) for one in A] == [0] * 5 + [5] * 5 + [10] * 2
    x = torch.randn(1, 4, 6)
    assert_same_output(ours(x), theirs(x))


def test_a_file_whose_layers_disagree_is_refused(tmp_path: Path) -> None:
    by_peft(stories(), peft.LilyConfig(r=4, stride_A=2, num_B=3, target_modules=LAYERS), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    tensors["base_model.model.model.layers.1.self_attn.q_proj.lily_A.weight"] += 1
    save_file(tensors, tmp_path / TENSORS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"q_proj': lily_A.weight differs from that of a layer that shares it"):
        isotune.load(stories(), tmp_path)
    lost = "model.layers.1.self_attn.q_proj"
    config = tmp_path / CONFIG
    config.write_text(config.read_text().replace('"q_proj"', '"k_proj"'))
    with pytest.raises(IsotuneError, match=rf"lily: .*q_proj' ends in none of groups.*|{lost}"):
        isotune.load(stories(), tmp_path)


def test_names_that_peft_takes_for_each_other_are_kept_from_it(tmp_path: Path) -> None:
    model = nn.Sequential()
    for name in ("proj", "kv_proj"):
        model.add_module(name, nn.Linear(4, 4))
    isotune.adapt(model, lily(routing="sequence"), ["proj", "kv_proj"])
    isotune.save(model, tmp_path)
    assert "ISOTUNE_LILY" in (tmp_path / CONFIG).read_text()
    assert "takes 'kv_proj' for a layer of 'proj'" in (tmp_path / "README.md").read_text()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(OptionError, match="experts"):
        lily(experts=1)
    with pytest.raises(OptionError, match=r"down_proj' ends in none of groups=\('q_proj',\)"):
        isotune.adapt(stories(), lily(groups=("q_proj",)), ["down_proj"])
    with pytest.raises(OptionError, match="lily shares lily_A, lily_B among all layers, so that overrides"):
        isotune.adapt(stories(), lily(), LAYERS, overrides={"v_proj": {"scale": 2.0}})
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double())
    with pytest.raises(OptionError, match="all layers have to be on one device and of one precision"):
        isotune.adapt(mixed, lily(groups=("",)), ["0", "1"])
