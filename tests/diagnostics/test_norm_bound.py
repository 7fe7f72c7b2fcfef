"""Bounds of what enters attention: never below what is measured, and closed forms for the scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.diagnostics import attention_bounds, attention_norms, scale_to_bound
from isotune.errors import CheckpointError, OptionError, TargetError
from support import MINILM, STORIES, adapted, minilm, stories, tokens

MODELS = {"minilm": (minilm, MINILM, 6), "stories": (stories, STORIES, 5)}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("settings", [LoRA(rank=4), HRA(rank=4)], ids=["lora", "hra"])
def test_what_is_measured_is_within_the_bounds(name: str, settings: Any, tmp_path: Path) -> None:
    make, base, count = MODELS[name]
    model = adapted(make(), settings, "query-value", size=0.1)
    isotune.save(model, tmp_path)
    bounds = {bound.layer: bound for bound in attention_bounds(tmp_path, base)}
    assert len(bounds) == count
    for found, of in (
        (attention_norms(model, tokens(model)), "after"),
        (attention_norms(model, tokens(model), False), "before"),
    ):
        assert found.keys() == bounds.keys()
        for layer, roles in found.items():
            for role, measured in roles.items():
                assert 0 < measured.largest <= getattr(bounds[layer], of)[role]
                assert measured.kurtosis > 1
    for bound in bounds.values():
        assert bound.norm is not None
        assert list(bound.before) == ["query", "key", "value"]
        assert bound.after["key"] == bound.before["key"]
        assert bound.after["query"] > bound.before["query"]
        assert bound.rho_after >= bound.rho_before > 0


def test_an_adapter_at_its_start_changes_no_bound(tmp_path: Path) -> None:
    isotune.save(isotune.adapt(stories(), LoRA(rank=4), "attention"), tmp_path)
    for bound in attention_bounds(tmp_path):
        assert bound.after == bound.before
        assert bound.rho_after == bound.rho_before
    assert scale_to_bound(tmp_path, 100) is None


def test_the_change_of_a_bound_is_linear_in_the_scale_of_the_adapter(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=2), "attention", size=0.1)
    isotune.save(model, tmp_path / "one")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter *= 3
    isotune.save(model, tmp_path / "three")
    for one, three in zip(attention_bounds(tmp_path / "one"), attention_bounds(tmp_path / "three"), strict=True):
        for role in ("query", "key", "value"):
            assert three.after[role] - three.before[role] == pytest.approx(
                3 * (one.after[role] - one.before[role]), rel=1e-3
            )


def test_at_the_scale_found_the_bound_is_met(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=2), "attention", size=0.1)
    isotune.save(model, tmp_path / "one")
    before = max(bound.rho_before for bound in attention_bounds(tmp_path / "one"))
    scale = scale_to_bound(tmp_path / "one", before + 1)
    assert scale is not None
    assert scale > 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter *= scale
    isotune.save(model, tmp_path / "scaled")
    assert max(bound.rho_after for bound in attention_bounds(tmp_path / "scaled")) == pytest.approx(
        before + 1, rel=1e-4
    )
    assert (scale_to_bound(tmp_path / "one", before / 2) or 0) < 0  # the base alone is above it


def test_packed_projections_count_as_all_three(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=64)
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted(model, LoRA(rank=2), ["c_attn"])
    isotune.save(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    bounds = attention_bounds(tmp_path / "adapter")
    measured = attention_norms(model, {"input_ids": torch.arange(2, 12)[None]})
    assert [list(bound.after) for bound in bounds] == [["packed"], ["packed"]]
    for bound in bounds:
        assert bound.input_norm == pytest.approx(32**0.5)  # gains of one
        assert measured[bound.layer]["packed"].largest <= bound.after["packed"]


def test_a_given_length_and_norm_are_used(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path)
    short, long = (attention_bounds(tmp_path, length=length)[0] for length in (16, 256))
    assert short.rho_after == pytest.approx(2**0.5 * long.rho_after)  # ln 256 = 2 ln 16
    half, whole = (attention_bounds(tmp_path, input_norm=norm)[0] for norm in (0.5, 1.0))
    assert half.after["query"] == pytest.approx(whole.after["query"] / 2)
    assert half.norm is None


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "lost", base_model="no/such-base")
    with pytest.raises(CheckpointError, match="need the weights of its base"):
        attention_bounds(tmp_path / "lost")
    with pytest.raises(OptionError, match="length=1 is not usable; it must be 2 or more"):
        attention_bounds(tmp_path / "lost", length=1)
    with pytest.raises(OptionError, match="rho_max=0 is not usable; it must be above 0"):
        scale_to_bound(tmp_path / "lost", 0)
    with pytest.raises(TargetError, match="no layer of this model"):
        attention_norms(nn.Linear(2, 2), {})
