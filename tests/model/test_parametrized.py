"""Adapters on parameters that their module computes with itself: recurrent, packed, transposed and fused weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import peft
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

import isotune
from isotune import HRA, LoRA, Settings
from isotune.adapters.low_rank.lora import LoRAAdapter
from isotune.adapters.registry import method_class, method_names
from isotune.bare import bare
from isotune.diagnostics import diagnose
from isotune.errors import IsotuneError, NoLowRankFormError, OptionError, TargetError
from isotune.matrix import Matrix
from isotune.model.adapted import adapted_site
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import adapted, assert_same_output, assert_unchanged, move, snapshot

METHODS = [HRA(rank=2), HRA(rank=3, side="out", start="anchored"), LoRA(rank=2)]
D = 8


class Host(nn.Module):
    """A model of one module, called as its class wants to be."""

    def __init__(self, module: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.module: Any = module
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.module, x)


def attend(module: Any, x: Tensor) -> Tensor:
    return module(x, x[..., : module.kdim], x[..., : module.vdim])[0]


def recur(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def mix(module: nn.Module, x: Tensor) -> Tensor:
    """Every row through two of the three experts."""
    rows = x.flatten(0, -2)
    chosen = torch.arange(2 * len(rows)).reshape(-1, 2) % 3
    return module(rows, chosen, torch.tensor([0.25, 0.75]).expand(len(rows), 2))


def deconvolve(module: nn.Module, x: Tensor) -> Tensor:
    return module(x.mT if isinstance(module, nn.ConvTranspose1d) else x.mT[..., None])


def experts() -> nn.Module:
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = transformers.MixtralConfig(hidden_size=D, intermediate_size=5, num_local_experts=3)
    config._experts_implementation = "eager"
    module = MixtralExperts(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@dataclass
class Kind:
    """A module with weights of its own, how it is called, and the matrices that naming it adapts."""

    make: Callable[[], nn.Module]
    call: Callable[[Any, Tensor], Tensor]
    shapes: dict[str, tuple[int, int]]


KINDS = {
    "attention": Kind(lambda: nn.MultiheadAttention(D, 2, batch_first=True), attend, {"in_proj_weight": (3 * D, D)}),
    "attention-apart": Kind(
        lambda: nn.MultiheadAttention(D, 2, kdim=6, vdim=4, batch_first=True, add_bias_kv=True),
        attend,
        {"q_proj_weight": (D, D), "k_proj_weight": (D, 6), "v_proj_weight": (D, 4)},
    ),
    "lstm": Kind(
        lambda: nn.LSTM(D, 6, num_layers=2, bidirectional=True, proj_size=4, batch_first=True),
        recur,
        {
            f"weight_{part}_l{layer}{end}": shape
            for layer, n_in in ((0, D), (1, 8))
            for end in ("", "_reverse")
            for part, shape in (("ih", (24, n_in)), ("hh", (24, 4)), ("hr", (4, 6)))
        },
    ),
    "gru": Kind(lambda: nn.GRU(D, 6), recur, {"weight_ih_l0": (18, D), "weight_hh_l0": (18, 6)}),
    "rnn": Kind(lambda: nn.RNN(D, 6, bias=False), recur, {"weight_ih_l0": (6, D), "weight_hh_l0": (6, 6)}),
    "transposed-1d": Kind(lambda: nn.ConvTranspose1d(D, 6, 3, stride=2, groups=2), deconvolve, {"weight": (9, D)}),
    "transposed-2d": Kind(lambda: nn.ConvTranspose2d(D, 4, (3, 2), padding=(1, 0)), deconvolve, {"weight": (24, D)}),
    "experts": Kind(
        experts,
        mix,
        {f"gate_up_proj.{i}": (10, D) for i in range(3)} | {f"down_proj.{i}": (D, 5) for i in range(3)},
    ),
}

# torch, for any LSTM with projections.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'side', 'both')}")


def host(kind: str) -> Host:
    torch.manual_seed(1)
    # Frozen: torch chooses kernels, and with them the rounding, by what wants a gradient.
    return Host(KINDS[kind].make(), KINDS[kind].call).eval().requires_grad_(False)


def out(model: nn.Module, x: Tensor) -> Tensor:
    """The output, without a graph."""
    with torch.no_grad():
        return model(x)


def rows() -> Tensor:
    return torch.randn(2, 5, D, generator=torch.Generator().manual_seed(2))


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def dense(model: Host, kind: str) -> Host:
    """A fresh module with the adapted weights written into it, by the layouts that torch documents."""
    twin = host(kind)
    with torch.no_grad():
        for path, layer in adapted_layers(model):
            adapter = layer.isotune["default"]
            name, _, index = path.removeprefix("module.").partition(".")
            parameter = getattr(twin.module, name)
            if kind.startswith("transposed"):  # (in, out / groups, *kernel)
                parameter.copy_(adapter.weight(parameter.flatten(1).T).T.reshape(parameter.shape))
            elif index:
                parameter[int(index)] = adapter.weight(parameter[int(index)].clone())
            else:
                parameter.copy_(adapter.weight(parameter.clone()))
    return twin


@every_kind
@every_method
def test_the_forward_is_that_of_the_dense_weights_and_every_factor_learns(kind: str, method: Settings) -> None:
    model, x = host(kind), rows()
    before = out(model, x)
    isotune.adapt(model, method, ["module"], seed=0)
    assert {row.site: row.method for row in isotune.describe(model)} == {
        f"module.{name}": method.name for name in KINDS[kind].shapes
    }
    assert_same_output(model(x), before)
    move(model, size=0.2)
    assert_same_output(model(x), dense(model, kind)(x))
    assert (model(x) - before).abs().max() > 1e-3
    model.train()
    model(x).square().sum().backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    assert all(".isotune.default." in name for name in trained)


@every_kind
@every_method
def test_folding_keeps_the_output_and_unfolding_and_removing_restore_the_bits(kind: str, method: Settings) -> None:
    model, x = host(kind), rows()
    module, original, base = model.module, bits(model), out(model, x)
    parameters = dict(model.named_parameters())
    adapted(model, method, ["module"], size=0.2)
    before, inside = out(model, x), bits(model)
    with isotune.disabled(model):
        assert torch.equal(out(model, x), base)
    isotune.fold(model)
    assert_same_output(model(x), before)
    isotune.unfold(model)
    assert all(torch.equal(tensor, inside[name]) for name, tensor in bits(model).items())
    assert torch.equal(out(model, x), before)
    isotune.remove(model)
    assert model.module is module
    assert type(module) is type(KINDS[kind].make())
    assert list(bits(model)) == list(original)
    assert all(torch.equal(tensor, original[name]) for name, tensor in bits(model).items())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
    assert torch.equal(out(model, x), base)


@every_kind
def test_folding_without_the_base_leaves_a_plain_module(kind: str) -> None:
    model, x = adapted(host(kind), HRA(rank=2), ["module"], size=0.2), rows()
    before = out(model, x)
    isotune.fold(model, keep_base=False)
    assert type(model.module) is type(KINDS[kind].make())
    assert all(not type(module).__module__.startswith("isotune") for module in model.modules())
    assert list(model.state_dict()) == list(host(kind).state_dict())
    assert_same_output(model(x), before)


@every_kind
@every_method
def test_a_saved_adapter_loads_to_the_same_bits_and_is_our_own_type(
    kind: str, method: Settings, tmp_path: Path
) -> None:
    model, x = adapted(host(kind), method, ["module"], size=0.2), rows()
    isotune.save(model, tmp_path / "one")
    loaded = isotune.load(host(kind), tmp_path / "one").eval()
    assert torch.equal(out(loaded, x), out(model, x))
    isotune.save(loaded, tmp_path / "two")
    one, two = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert f"ISOTUNE_{method.name.upper()}" in (tmp_path / "one" / "adapter_config.json").read_text()
    assert "is a parameter and no layer, which PEFT does not adapt" in (tmp_path / "one" / "README.md").read_text()
    isotune.load_weights(move(isotune.use(loaded, "default"), seed=4), tmp_path / "one")
    assert torch.equal(out(loaded, x), out(model, x))
    with pytest.raises(NoLowRankFormError, match=r"is a parameter and no layer.*--to merged"):
        isotune.export_lora(model, tmp_path / "lora")


@every_kind
def test_inspect_measures_the_change_of_each_matrix_against_a_stored_base(kind: str, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    model = host(kind)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, tmp_path / "base/model.safetensors")
    isotune.save(adapted(model, HRA(rank=2), ["module"], size=0.2), tmp_path / "adapter")
    found = diagnose(tmp_path / "adapter", tmp_path / "base")
    measured = {row.site.removeprefix("module."): (row.out_features, row.in_features) for row in found.sites}
    assert measured == KINDS[kind].shapes
    weights = dict(adapted_layers(model))
    for row in found.sites:
        layer = weights[row.site]
        assert isinstance(layer, Matrix)
        W = bare(layer, "weight").detach()
        assert row.change_rank == 2
        assert row.change_norm == pytest.approx(
            float((adapted_site(layer).weight.detach() - W).norm() / W.norm()), rel=1e-4
        )


@every_kind
def test_a_deep_copy_is_independent_also_when_the_original_loses_its_adapter(kind: str) -> None:
    model, x = adapted(host(kind), LoRA(rank=2), ["module"], size=0.2), rows()
    expected = out(model, x)
    for _ in range(2):  # straight after a forward pass with a graph, and after a move
        model(x)
        twin = copy.deepcopy(model)
        assert torch.equal(out(twin, x), expected)
        move(twin, seed=3)
        assert torch.equal(out(model, x), expected)
        model.double().float()
    isotune.remove(model)
    twin = isotune.fold(twin)
    isotune.remove(isotune.unfold(twin))
    assert torch.equal(out(twin, x), out(model, x))


@every_kind
def test_adapters_stack_and_switch(kind: str) -> None:
    model, x = host(kind), rows()
    adapted(adapted(model, HRA(rank=2), ["module"], name="one"), LoRA(rank=2), ["module"], name="two", seed=5)
    isotune.use(model, "one", "two")
    both = out(model, x)
    for path, layer in adapted_layers(model):
        assert isinstance(layer, Matrix), path
        expected = layer.isotune["two"].weight(layer.isotune["one"].weight(bare(layer, "weight")))
        torch.testing.assert_close(adapted_site(layer).weight, expected)
    isotune.remove(model, "two")
    assert not torch.allclose(model(x), both)
    assert {row.adapter for row in isotune.describe(model)} == {"one"}
    with pytest.raises(IsotuneError, match="a parameter, which the rows of a batch must share"):
        isotune.use(model, rows=["one", None])


@every_kind
def test_the_weight_is_computed_once_for_each_forward_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(host(kind), LoRA(rank=2), ["module"]), []
    plain = LoRAAdapter.weight
    monkeypatch.setattr(LoRAAdapter, "weight", lambda self, W: calls.append(self) or plain(self, W))
    model(rows())
    assert len(calls) == len(KINDS[kind].shapes)


def test_packed_and_output_projections_of_attention_are_adapted_together_also_on_the_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, 12, dropout=0.0, batch_first=True)
    model = nn.Sequential(layer, copy.deepcopy(layer)).eval()
    x = rows()
    adapted(model, HRA(rank=2), ["in_proj_weight", "self_attn.out_proj", "linear1"], size=0.2)
    assert len(isotune.describe(model)) == 6
    slow = out(model, x)
    with torch.no_grad():
        assert_same_output(model(x), slow)
    isotune.fold(model)
    assert_same_output(model(x), slow)


def test_a_trained_lstm_moves_and_a_base_weight_that_others_share_does_not() -> None:
    model = nn.ModuleDict({"lstm": nn.LSTM(D, 6, batch_first=True), "tied": nn.LSTM(D, 6, batch_first=True)})
    model["tied"].weight_ih_l0 = model["lstm"].weight_ih_l0
    x, base = rows(), copy.deepcopy(model["tied"])(rows())[0].detach()
    isotune.adapt(model, HRA(rank=2), ["lstm.weight_ih_l0"], seed=0)
    assert [row.site for row in isotune.describe(model)] == ["lstm.weight_ih_l0"]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model["lstm"](x)[0] - 0.1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    isotune.fold(model)
    assert torch.equal(model["tied"](x)[0], base)


def test_an_lstm_reads_its_weights_anew_after_it_moved_and_flattens_them() -> None:
    model, x = adapted(host("lstm"), HRA(rank=2), ["module"], size=0.2), rows()
    before = out(model, x)
    model.double()
    assert_same_output(model(x.double()).float(), before)
    model.float()
    model.module.flatten_parameters()
    assert_same_output(model(x), before)
    # Nothing of the graph stays behind where cuDNN's weights are listed.
    assert not any(w is not None and w.requires_grad for w in model.module._flat_weights)
    assert torch.equal(out(model, x), out(model, x))
    model(x).sum().backward()


def test_some_experts_and_other_options_for_some_of_them() -> None:
    model = host("experts")
    isotune.adapt(model, HRA(rank=2), r"module\.down_proj\.[02]", overrides={"down_proj.2": {"rank": 4}}, seed=0)
    assert {row.site: row.trainable for row in isotune.describe(model)} == {
        "module.down_proj.0": 2 * 5,
        "module.down_proj.2": 4 * 5,
    }
    everywhere = isotune.adapt(host("experts"), HRA(rank=2), "down_proj", overrides={"down_proj": {"rank": 4}})
    assert [row.trainable for row in isotune.describe(everywhere)] == [20, 20, 20]
    rest = isotune.adapt(host("experts"), HRA(rank=2), "module", exclude=["gate_up_proj"])
    assert [row.site for row in isotune.describe(rest)] == [f"module.down_proj.{i}" for i in range(3)]


def test_transposed_experts_are_seen_as_out_by_in() -> None:
    model = host("experts")
    model.module.is_transposed = True
    isotune.adapt(model, LoRA(rank=2), ["down_proj"], seed=0)
    (layer, *_) = (layer for _, layer in adapted_layers(model))
    assert (require_site(layer, "").out_features, require_site(layer, "").in_features) == (5, D)
    assert_same_output(move(model)(rows()), model(rows()))


def test_a_mixtral_trains_through_its_experts_as_through_dense_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, vocab_size=40, head_dim=8,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config).eval()
    ids = torch.arange(3, 15).reshape(2, 6)
    presets = {row.site for row in isotune.describe(isotune.adapt(copy.deepcopy(model), HRA(rank=2), "all-linear"))}
    assert not any("experts" in path for path in presets)
    adapted(model, HRA(rank=2), ["experts", "q_proj"], size=0.2)
    assert len(isotune.describe(model)) == 2 * (6 + 1)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    isotune.save(model, tmp_path / "adapter")
    before = model(ids).logits.detach()
    again = isotune.load(copy.deepcopy(isotune.remove(copy.deepcopy(model))), tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, before)
    isotune.fold(model, keep_base=False).save_pretrained(tmp_path / "folded")
    plain = transformers.MixtralForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert_same_output(plain(ids).logits, before)


def test_lora_on_experts_is_pefts_lora_on_target_parameters() -> None:
    theirs = peft.get_peft_model(
        host("experts"),
        peft.LoraConfig(
            r=2, lora_alpha=2, target_modules=[], target_parameters=["module.down_proj"], init_lora_weights=False
        ),
    )
    state = {name: t for name, t in theirs.state_dict().items() if "lora_" in name}
    (A,) = (t for name, t in state.items() if "lora_A" in name)
    (B,) = (t for name, t in state.items() if "lora_B" in name)
    ours = isotune.adapt(host("experts"), LoRA(rank=2), ["down_proj"], seed=0)
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapted_layers(ours)):
            adapter: Any = layer.isotune["default"]
            adapter.A.copy_(A.reshape(3, 2, -1)[index])
            adapter.B.copy_(B.reshape(B.shape[0], 2, 3)[:, :, index])
    assert_same_output(ours(rows()), theirs(rows()))


class _DenseOnly(LoRAAdapter):
    """Has a weight for square matrices only."""

    def weight(self, W: Tensor) -> Tensor:
        if W.shape[0] != W.shape[1]:
            raise OptionError(f"the weight must be square, not {tuple(W.shape)}")
        return super().weight(W)


class SquareOnly(LoRA):
    """A method without a weight for some shapes."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def build(self, site: Any, generator: torch.Generator) -> LoRAAdapter:
        built = super().build(site, generator)
        return _DenseOnly(built.A.data, built.B.data)


class NotLinear(LoRA):
    """A method for convolutions only."""

    kinds: ClassVar[frozenset[str]] = frozenset({"conv2d"})


@pytest.mark.parametrize(
    ("settings", "targets", "said"),
    [
        (SquareOnly(rank=2), "module", r"cannot adapt 'module.weight_ih_l0', a parameter of a GRU.*must be square"),
        (LoRA(rank=2, dropout=0.1), "module", "its dropout acts on rows that enter a layer.*set dropout=0"),
        (NotLinear(rank=2), "module", "it can adapt: conv2d"),
        (HRA(rank=100), "weight_hh_l0", "hra at 'module.weight_hh_l0': rank 100 is larger than the layer"),
        (HRA(rank=2), "weight_hh_l1", "match no layer.*weight_ih_l0, weight_hh_l0.*Did you mean 'weight_hh_l0'"),
        (HRA(rank=2), "bias_ih_l0", "match no layer"),
    ],
)
def test_what_cannot_be_adapted_is_said_and_the_model_stays_as_it_was(
    settings: Settings, targets: str, said: str
) -> None:
    model = host("gru")
    before = snapshot(model)
    with pytest.raises((TargetError, OptionError), match=said):
        isotune.adapt(model, settings, targets, seed=0)
    assert_unchanged(model, before)
    assert type(model.module) is nn.GRU


def test_an_adapter_for_another_shape_or_for_a_layer_is_refused(tmp_path: Path) -> None:
    isotune.save(isotune.adapt(host("gru"), HRA(rank=2), ["weight_ih_l0"]), tmp_path)
    with pytest.raises(IsotuneError, match=r"'module.weight_ih_l0' was \[18, 8\] there and is \[6, 8\] here"):
        isotune.load(host("rnn"), tmp_path)
    with pytest.raises(IsotuneError, match=r"this model has no layer 'module.weight_ih_l0'"):
        isotune.load(host("attention"), tmp_path)


def changes_a_weight(name: str) -> bool:
    """Whether a matrix is all that the method needs of a layer."""
    return "linear" in method_class(name).kinds and name not in ("mola", "lily", "bitfit")


@pytest.mark.parametrize("name", [name for name in method_names() if changes_a_weight(name)])
def test_every_method_adapts_parameters_too(name: str, tmp_path: Path) -> None:
    def fresh() -> Host:
        torch.manual_seed(3)
        return Host(nn.LSTM(64, 16, batch_first=True), recur).eval().requires_grad_(False)

    x, settings = torch.randn(2, 5, 64), fitting(name)
    model = isotune.adapt(fresh(), settings, ["module.weight_ih_l0"], seed=0)
    if settings.identity_at_start:
        assert_same_output(out(model, x), out(fresh(), x))
    move(model)
    isotune.after_step(model)
    (layer,) = (layer for _, layer in adapted_layers(model))
    twin = fresh()
    twin.module.weight_ih_l0.copy_(layer.isotune["default"].weight(twin.module.weight_ih_l0).detach())
    moved = out(model, x)
    assert_same_output(moved, out(twin, x))
    assert not torch.allclose(moved, out(fresh(), x), atol=1e-6)
    loaded = isotune.load(fresh(), isotune.save(model, tmp_path / "adapter"))
    assert torch.equal(out(loaded.eval(), x), moved)
    assert_same_output(out(isotune.fold(model), x), moved)
    assert torch.equal(out(isotune.unfold(model), x), moved)


def fitting(name: str) -> Settings:
    """The method at its defaults, or of a smaller rank where these do not fit a 64 x 64 matrix."""
    for options in ({}, *({"rank": rank} for rank in (16, 8, 4, 2))):
        try:
            settings = isotune.method(name, **options)
            settings.build(require_site(nn.Linear(64, 64), name), torch.Generator())
        except OptionError:
            continue
        return settings
    raise AssertionError(f"{name}: neither the default options nor a smaller rank fit a 64 x 64 layer")
