"""Both directions with PEFT: what one writes the other loads, with the same outputs to 1e-5 in fp32."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import nn

import isotune
from isotune import HRA, LoRA, Settings
from peers import peft_adapt, peft_load
from support import adapted, assert_same_output, minilm, output, stories, tokens

MODELS = {"minilm": minilm, "llama": stories}
ATTENTION = {"minilm": ["query", "value"], "llama": ["q_proj", "o_proj", "down_proj"]}
on_both_models = pytest.mark.parametrize("base", MODELS)

METHODS = {
    "hra even": HRA(rank=4),
    "hra odd": HRA(rank=5, start="random"),
    "hra strict": HRA(rank=4, strict=True, start="random"),
    "hra anchored": HRA(rank=3, start="anchored"),
    "hra strict anchored": HRA(rank=3, strict=True),
    "lora": LoRA(rank=4),
    "lora scaled": LoRA(rank=4, alpha=10),
    "rslora": LoRA(rank=4, alpha=10, rslora=True),
}


@on_both_models
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_what_isotune_saves(base: str, method: str, tmp_path: Path) -> None:
    model = adapted(MODELS[base](), METHODS[method], ATTENTION[base])
    isotune.save(model, tmp_path / "adapter")
    loaded = peft_load(MODELS[base](), tmp_path / "adapter")
    assert_same_output(output(loaded), output(model))
    assert not torch.allclose(output(loaded), output(MODELS[base]()), atol=1e-3)


CONFIGS = {
    "hra even": lambda targets: peft.HRAConfig(r=4, target_modules=targets),
    "hra odd": lambda targets: peft.HRAConfig(r=5, target_modules=targets),
    "hra strict": lambda targets: peft.HRAConfig(r=4, apply_GS=True, init_weights=False, target_modules=targets),
    "lora": lambda targets: peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets),
    "rslora": lambda targets: peft.LoraConfig(r=4, lora_alpha=7, use_rslora=True, target_modules=targets),
    "lora patterns": lambda targets: peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, rank_pattern={targets[0]: 2, rf"layers?\.1\..*{targets[1]}": 6},
        alpha_pattern={targets[1]: 3},
    ),
    "lora with dropout": lambda targets: peft.LoraConfig(r=4, lora_dropout=0.3, target_modules=targets),
}  # fmt: skip


@on_both_models
@pytest.mark.parametrize("config", CONFIGS)
def test_isotune_loads_what_peft_saves(base: str, config: str, tmp_path: Path) -> None:
    theirs = peft_adapt(MODELS[base](), CONFIGS[config](ATTENTION[base]))
    theirs.save_pretrained(tmp_path)
    loaded = isotune.load(MODELS[base](), tmp_path).eval()
    assert_same_output(output(loaded), output(theirs))
    # And what isotune then saves, PEFT reads again.
    isotune.save(loaded, tmp_path / "again")
    assert_same_output(output(peft_load(MODELS[base](), tmp_path / "again")), output(theirs))


@on_both_models
@pytest.mark.parametrize("config", ["hra odd", "lora"])
def test_a_plain_optimizer_trains_what_peft_saved_as_peft_would(base: str, config: str, tmp_path: Path) -> None:
    """With the rate that was found there: `parameter_groups` alone takes steps of isotune's length."""
    theirs = peft_adapt(MODELS[base](), CONFIGS[config](ATTENTION[base]))
    theirs.save_pretrained(tmp_path)
    models = theirs.eval(), isotune.load(MODELS[base](), tmp_path, trainable=True).eval()
    before = output(models[0])
    for model in models:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            model(**tokens(model))[0].square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (output(models[0]) - before).abs().max() > 1e-3
    assert_same_output(output(models[1]), output(models[0]))


@st.composite
def drawn_methods(draw: st.DrawFn) -> Settings:
    if draw(st.booleans()):
        start = draw(st.sampled_from(["paired", "random", "anchored"]))
        strict = draw(st.booleans()) and start != "paired"
        rank = draw(st.integers(1, 8))
        return HRA(rank=rank * 2 if start == "paired" else rank, start=start, strict=strict)
    return LoRA(rank=draw(st.integers(1, 8)), alpha=draw(st.integers(1, 32)), rslora=draw(st.booleans()))


@profile(max_examples=6)
@given(drawn_methods(), st.integers(0, 99), st.sets(st.sampled_from(["q_proj", "v_proj", "up_proj"]), min_size=1))
def test_any_drawn_adapter_means_the_same_in_peft(
    tmp_path_factory: pytest.TempPathFactory, method: Settings, seed: int, targets: set[str]
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    model = adapted(stories(), method, sorted(targets), seed=seed)
    isotune.save(model, folder)
    assert_same_output(output(peft_load(stories(), folder)), output(model))
    assert torch.equal(output(isotune.load(stories(), folder).eval()), output(model))


def test_overrides_are_saved_as_rank_and_alpha_patterns(tmp_path: Path) -> None:
    overrides = {"value": {"rank": 6}, r".*layer\.1\..*query": {"alpha": 3.0}}
    model = adapted(minilm(), LoRA(rank=4), ["query", "value"], overrides=overrides)
    isotune.save(model, tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    assert len(config.rank_pattern) == 6
    assert "encoder.layer.1.attention.self.query" in config.alpha_pattern
    assert_same_output(output(peft_load(minilm(), tmp_path)), output(model))
    assert torch.equal(output(isotune.load(minilm(), tmp_path).eval()), output(model))


@pytest.mark.parametrize("method", [HRA(rank=4), LoRA(rank=4)], ids=lambda method: method.name)
def test_modules_trained_in_full_are_pefts_modules_to_save(method: Settings, tmp_path: Path) -> None:
    model = adapted(minilm(), method, ["query"], train_also=["pooler"])
    expected = model(**tokens(model)).pooler_output
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(minilm(), tmp_path / "ours")
    assert_same_output(theirs(**tokens(model)).pooler_output, expected)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = isotune.load(minilm(), tmp_path / "theirs").eval()
    assert_same_output(loaded(**tokens(model)).pooler_output, expected)


def test_lora_on_an_embedding_goes_both_ways(tmp_path: Path) -> None:
    model = adapted(minilm(), LoRA(rank=4, alpha=6), ["word_embeddings", "query"], size=0.02)
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(minilm(), tmp_path / "ours")
    assert_same_output(output(theirs), output(model))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert_same_output(output(isotune.load(minilm(), tmp_path / "theirs").eval()), output(model))


def test_base_embedding_that_peft_saves_beside_its_adapter_must_be_the_models(tmp_path: Path) -> None:
    theirs = peft_adapt(stories(), peft.LoraConfig(r=4, target_modules=["embed_tokens"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    assert_same_output(output(isotune.load(stories(), tmp_path).eval()), output(theirs))
    other = stories()
    other.model.embed_tokens.weight.data += 1
    with pytest.raises(isotune.IsotuneError, match=r"its own weight for 'model\.embed_tokens', which differs"):
        isotune.load(other, tmp_path)


def convolutions(**options: Any) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, **options), nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}, {"bias": False}], ids=str)
@pytest.mark.parametrize("method", [HRA(rank=2), LoRA(rank=2)], ids=lambda method: method.name)
def test_convolutions_go_both_ways(method: Settings, options: dict[str, Any], tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = adapted(convolutions(**options), method, ["0", "2"])
    isotune.save(model, tmp_path / "ours")
    theirs = peft_load(convolutions(**options), tmp_path / "ours")
    assert_same_output(theirs(x), model(x))
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_output(isotune.load(convolutions(**options), tmp_path / "theirs")(x), model(x))


@pytest.mark.parametrize(
    "options",
    [{"dilation": 2}, {"padding": 1, "padding_mode": "circular"}, {"stride": (2, 1)}, {"padding": (1, 0)}],
    ids=str,
)
def test_convolutions_that_peft_computes_otherwise_are_saved_as_isotunes_own(
    options: dict[str, Any], tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 9, 9)
    model = adapted(convolutions(**options), HRA(rank=2), ["0"])
    config = peft.HRAConfig(r=2, target_modules=["0"])
    theirs = peft_adapt(convolutions(**options), config)
    theirs.base_model.model[0].hra_u["default"].data = model[0].isotune["default"].U.data.clone()
    got = theirs(x)
    assert got.shape != model(x).shape or not torch.allclose(got, model(x), atol=1e-3)
    isotune.save(model, tmp_path / "ours")
    assert torch.equal(isotune.load(convolutions(**options), tmp_path / "ours")(x), model(x))
    with pytest.raises((ValueError, KeyError)):
        peft_load(convolutions(**options), tmp_path / "ours")


def test_peft_gram_schmidt_with_its_default_start_is_not_orthogonal_and_isotunes_is() -> None:
    theirs = peft_adapt(nn.Sequential(nn.Linear(64, 64)), peft.HRAConfig(r=8, apply_GS=True, target_modules=["0"]))
    layer = theirs.base_model.model[0]
    layer.reset_hra_parameters("default")
    U = layer.hra_u["default"].detach()
    eye = torch.eye(64)
    H = layer.get_delta_weight("default").detach()
    assert (H.mT @ H - eye).norm() > 0.1
    model = isotune.adapt(nn.Sequential(nn.Linear(64, 64)), HRA(rank=8, strict=True, start="random"), ["0"])
    model[0].isotune["default"].U.data.copy_(U)
    ours = model[0].isotune["default"].weight(eye).detach()
    assert (ours.mT @ ours - eye).norm() < 1e-5


def test_peft_zero_column_gives_nan_and_isotunes_does_not() -> None:
    theirs = peft_adapt(nn.Sequential(nn.Linear(8, 8)), peft.HRAConfig(r=2, target_modules=["0"]))
    ours = adapted(nn.Sequential(nn.Linear(8, 8)), HRA(rank=2), ["0"])
    theirs.base_model.model[0].hra_u["default"].data[:, 0] = 0
    ours[0].isotune["default"].U.data[:, 0] = 0
    x = torch.randn(3, 8)
    assert theirs(x).isnan().any()
    assert ours(x).isfinite().all()


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.LoraConfig(r=4, init_lora_weights="mica", target_modules=["query"]), "init_lora_weights='mica'"),
        (peft.LoraConfig(r=4, bias="lora_only", target_modules=["query"]), "bias='lora_only'"),
        (
            peft.TrainableTokensConfig(token_indices=[1], target_modules=["word_embeddings"]),
            "of type 'TRAINABLE_TOKENS'; the types",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_peft_adapters_that_isotune_cannot_express_are_refused_by_name(
    config: peft.PeftConfig, said: str, tmp_path: Path
) -> None:
    peft_adapt(minilm(), config).save_pretrained(tmp_path)
    with pytest.raises(isotune.IsotuneError, match=said):
        isotune.load(minilm(), tmp_path)


def test_what_peft_cannot_express_is_saved_under_isotunes_own_type_with_the_reason(tmp_path: Path) -> None:
    model = adapted(stories(), HRA(rank=2, side="out"))
    isotune.save(model, tmp_path)
    assert '"peft_type": "ISOTUNE_HRA"' in (tmp_path / "adapter_config.json").read_text()
    assert "PEFT cannot load it: PEFT's HRA rotates the input side only" in (tmp_path / "README.md").read_text()
    assert torch.equal(output(isotune.load(stories(), tmp_path).eval()), output(model))
