"""What is particular to HiRA and LoHa, whose products are taken entry by entry; both ways with PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, by_peft, tiny_gpt2
from isotune.errors import CheckpointError, NoLowRankFormError
from support import adapted, assert_same_output, minilm, output, stories

TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {"down_proj": {"rank": 3}}


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 5, 1, stride=2)).eval()


def images(model: nn.Module) -> Tensor:
    return model(torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))).detach()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("hira", lambda targets, **own: peft.HiraConfig(r=4, target_modules=targets, **own)),
        ("loha", lambda targets, **own: peft.LoHaConfig(r=4, alpha=2, target_modules=targets, **own)),
    ],
)
def test_language_models_and_convolutions_go_both_ways(name: str, config: Callable[..., Any], tmp_path: Path) -> None:
    options = {"alpha": 2.0} if name == "loha" else {}
    method = isotune.method(name, rank=4, **options)
    patterns: dict[str, Any] = {"overrides": PATTERNS} if name == "loha" else {}
    assert_peft_loads(stories, method, tmp_path / "one", targets=TARGETS, **patterns)
    model = assert_isotune_loads(stories, config(TARGETS, rank_pattern={"down_proj": 3}), tmp_path / "b")
    rank = model.model.layers[0].mlp.down_proj.isotune.settings["default"].rank
    assert rank == (3 if name == "loha" else 4)  # PEFT's HIRA does not look at its rank_pattern
    assert_peft_loads(minilm, method, tmp_path / "minilm", targets=["query"])
    assert_peft_loads(convolutions, method, tmp_path / "conv", images, targets=["0", "2"])
    assert_isotune_loads(convolutions, config(["0", "2"]), tmp_path / "theirs", images)


def test_hira_on_gpt2_and_embeddings_goes_both_ways(tmp_path: Path) -> None:
    hira = isotune.method("hira", rank=4)
    assert_peft_loads(tiny_gpt2, hira, tmp_path / "gpt2", targets=["c_attn"], size=0.5)
    config = peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs = by_peft(tiny_gpt2(), config, tmp_path / "theirs")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "hira_B" in name:
                parameter.mul_(30)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not torch.allclose(output(theirs), output(tiny_gpt2()), atol=1e-3)
    assert_same_output(output(isotune.load(tiny_gpt2(), tmp_path / "theirs").eval()), output(theirs))
    assert_peft_loads(stories, hira, tmp_path / "embedding", targets=["embed_tokens"], size=0.5)


def test_hira_leaves_zeros_and_its_change_is_no_lora(tmp_path: Path) -> None:
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight[:, 2] = 0
    W = layer.weight.detach().clone()
    model = adapted(nn.Sequential(layer), isotune.method("hira", rank=2), ["0"], size=0.5)
    changed = model[0].weight.detach() - W
    assert not changed[:, 2].any()
    assert int(torch.linalg.matrix_rank(changed)) > 2
    with pytest.raises(NoLowRankFormError):
        isotune.export_lora(model, tmp_path / "lora")


def test_hiras_dropout_is_on_the_change_alone() -> None:
    model = adapted(nn.Sequential(nn.Linear(6, 4)), isotune.method("hira", rank=2, dropout=0.5), ["0"], size=0.5)
    x = torch.randn(2000, 6)
    with torch.no_grad():
        expected = model.eval()(x)
        base = nn.functional.linear(x, _bare(model), model[0].bias)
        found = model.train()(x)
    assert not torch.allclose(found, expected)
    mean = (found - base).mean(0)
    torch.testing.assert_close(mean, (expected - base).mean(0), rtol=0.3, atol=0.1)


def _bare(model: nn.Module) -> Tensor:
    from isotune.bare import bare

    weight = bare(model[0], "weight")
    assert isinstance(weight, Tensor)
    return weight


def test_loha_is_the_lora_of_all_products_of_columns() -> None:
    for rank in (2, 6):  # the second has more products than the layer has sides
        model = adapted(nn.Sequential(nn.Linear(8, 6)), isotune.method("loha", rank=rank), ["0"], size=0.5)
        adapter, W = model[0].isotune["default"], _bare(model)
        with torch.no_grad():
            product = (adapter.B1 @ adapter.A1) * (adapter.B2 @ adapter.A2)
            torch.testing.assert_close(model[0].weight, W + product)
            B, A = adapter.factors(W)
            torch.testing.assert_close(B @ A, product)
            assert B.shape[1] <= 6
            for n in (1, 500):  # few rows take the thin form, many the weight's
                x = torch.randn(n, 8)
                torch.testing.assert_close(model(x), x @ (W + product).mT + model[0].bias, rtol=1e-4, atol=1e-5)


def test_pefts_other_forms_of_loha_are_refused(tmp_path: Path) -> None:
    for own, said in (({"rank_dropout": 0.1}, "rank_dropout=0.1"), ({"use_effective_conv2d": True}, "effective")):
        folder = tmp_path / said
        by_peft(convolutions(), peft.LoHaConfig(r=2, target_modules=["0"], **own), folder)
        with pytest.raises(CheckpointError, match=said):
            isotune.load(convolutions(), folder)


def test_ranks_that_differ_and_groups_are_saved_as_isotunes_own(tmp_path: Path) -> None:
    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))

    other = adapted(stories(), isotune.method("hira", rank=2), TARGETS, overrides=PATTERNS)
    isotune.save(other, tmp_path / "ranks")
    assert torch.equal(output(isotune.load(stories(), tmp_path / "ranks").eval()), output(other))
    assert "ISOTUNE_HIRA" in (tmp_path / "ranks" / "adapter_config.json").read_text()
    model = adapted(base(), isotune.method("hira", rank=2), ["0"])
    isotune.save(model, tmp_path / "groups")
    loaded, x = isotune.load(base(), tmp_path / "groups"), torch.randn(1, 4, 5, 5)
    assert torch.equal(loaded(x), model(x))
    assert "ISOTUNE_HIRA" in (tmp_path / "groups" / "adapter_config.json").read_text()


def test_a_model_with_either_gives_finite_gradients_from_the_start() -> None:
    for name in ("hira", "loha"):
        model = isotune.adapt(stories(), isotune.method(name, rank=2), TARGETS, seed=0)
        before = output(model)
        assert torch.equal(before, output(stories()))
        loss = model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
        loss.backward()
        moved = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        assert any(bool(g.any()) for g in moved)
        assert all(bool(g.isfinite().all()) for g in moved)
