"""What is particular to SoRA and AdaLoRA: ranks that are given up, over all layers, and what is left of them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import isotune
from both_ways import assert_isotune_loads, assert_peft_loads, tiny_gpt2
from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.sora import SoRA
from isotune.errors import IsotuneError, OptionError
from isotune.training.weights import load_weights, save_weights
from support import adapted, assert_same_output, move, output, stories, tokens

TARGETS = ["q_proj", "v_proj"]


def sora(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5))
    return isotune.adapt(model, isotune.method("sora", rank=5, **options), ["0", "2"], seed=0)


def adapters(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, Adapter)]


def step(model: nn.Module, optimizer: torch.optim.Optimizer, progress: float) -> None:
    """One step of a training towards zero."""
    optimizer.zero_grad()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    (model(x).square().mean() + isotune.penalty(model)).backward()
    optimizer.step()
    isotune.after_step(model, progress)


def test_the_proximal_step_is_soft_thresholding() -> None:
    model = sora(threshold=0.01)
    adapter = adapters(model)[0]
    t = torch.tensor(0.01)
    before = torch.tensor([0.5, -0.5, 0.0, float(t), 0.015])
    adapter.g.data.copy_(before)
    isotune.after_step(model)
    torch.testing.assert_close(adapter.g.data, before.sign() * (before.abs() - t).clamp_min(0))
    # The authors' code zeroes what is below twice the threshold, and keeps what is at it.
    assert adapter.g[3] == 0
    assert adapter.g[4] > 0


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("linear", 5.05e-3), ("log_linear", 5.06e-3), ("exp_linear", 1e-3)],
)
def test_the_threshold_rises_level_by_level(schedule: Any, middle: float) -> None:
    settings = SoRA(threshold=1e-2, first_threshold=1e-4, levels=3, schedule=schedule)
    found = [settings.threshold_at(progress) for progress in (0.1, 0.5, 0.9, 1.0)]
    assert found == pytest.approx([1e-4, middle, 1e-2, 1e-2], rel=2e-3)
    assert SoRA(threshold=3e-4).threshold_at(0.1) == 3e-4


def test_without_a_threshold_nothing_closes_and_with_larger_ones_more_does() -> None:
    open_gates = []
    for threshold in (0.0, 2e-3, 1e-2):
        model = sora(threshold=threshold)
        optimizer = torch.optim.Adam(isotune.parameter_groups(model, lr=1e-3, weight_decay=0.1))
        assert any(group["weight_decay"] == 0 for group in optimizer.param_groups)
        for k in range(100):
            step(model, optimizer, (k + 1) / 100)
        open_gates.append(sum(int((adapter.g != 0).sum()) for adapter in adapters(model)))
    assert open_gates[0] == 10 >= open_gates[1] > open_gates[2]


def test_with_gates_of_one_it_is_a_lora_and_a_closed_gate_has_a_gradient() -> None:
    model, x = move(sora(alpha=5.0)), torch.randn(7, 8)
    adapter = adapters(model)[0]
    adapter.g.data.fill_(1)
    lora = isotune.adapt(nn.Sequential(nn.Linear(8, 6)), isotune.method("lora", rank=5), ["0"], seed=0)
    lora[0].isotune["default"].load_state_dict({"A": adapter.A, "B": adapter.B})
    with isotune.disabled(model):
        base = model[0](x)
    with isotune.disabled(lora):
        own = lora[0](x)
    torch.testing.assert_close(model[0](x) - base, lora[0](x) - own)
    adapter.g.data[1] = 0
    model(x).sum().backward()
    assert adapter.g.grad[1] != 0
    assert not adapter.B.grad[:, 1].any()


def test_what_is_left_is_an_exact_lora_of_the_ranks_in_use(tmp_path: Path) -> None:
    model = adapted(stories(), isotune.method("sora", rank=4), TARGETS, size=0.3)
    own = {path: layer for path, layer in model.named_modules() if hasattr(layer, "isotune")}
    sizes = {}
    for k, (path, layer) in enumerate(own.items()):
        layer.isotune["default"].g.data[: k % 5] = 0
        sizes[path] = (4 - k % 5) * (layer.in_features + layer.out_features)
    expected = output(model)
    isotune.export_lora(model, tmp_path / "lora")
    assert_same_output(output(isotune.load(stories(), tmp_path / "lora").eval()), expected)
    isotune.compact(model)
    assert_same_output(output(model), expected)
    assert {row.site: row.trainable for row in isotune.describe(model)} == {p: n for p, n in sizes.items() if n}
    assert all(row.method == "lora" for row in isotune.describe(model))
    with isotune.disabled(model):
        assert torch.equal(output(model), output(stories()))
    isotune.save(model, tmp_path / "compact")
    assert torch.equal(output(isotune.load(stories(), tmp_path / "compact").eval()), output(model))


def test_compact_says_what_it_cannot_do() -> None:
    model = adapted(stories(), isotune.method("hira", rank=4), TARGETS)
    with pytest.raises(IsotuneError, match=r"hira at 'model.layers.0.self_attn.q_proj' is no exact LoRA"):
        isotune.compact(model)
    with pytest.raises(IsotuneError, match="no adapter 'other'; the model has: default"):
        isotune.compact(model, "other")
    with pytest.raises(IsotuneError, match=r"name one; the model has: none"):
        isotune.compact(stories())
    whole = isotune.compact(adapted(stories(), isotune.method("hra", rank=4), TARGETS))
    assert_same_output(output(whole), output(adapted(stories(), isotune.method("hra", rank=4), TARGETS)))


def test_adalora_goes_both_ways_with_peft(tmp_path: Path) -> None:
    method = isotune.method("adalora", rank=4, keep=0.5)
    assert_peft_loads(stories, method, tmp_path / "one", targets=TARGETS, size=0.5)
    assert_peft_loads(tiny_gpt2, method, tmp_path / "gpt2", targets=["c_attn"], size=0.5)
    config = peft.AdaLoraConfig(init_r=6, target_r=3, total_step=100, tinit=10, tfinal=40, target_modules=TARGETS)
    model = assert_isotune_loads(stories, config, tmp_path / "theirs")
    found = model.model.layers[0].self_attn.q_proj.isotune.settings["default"]
    assert (found.rank, found.keep, found.warmup, found.final, found.alpha) == (6, 0.5, 0.1, 0.4, 8.0)


def test_adalora_keeps_the_ranks_that_peft_keeps(tmp_path: Path) -> None:
    steps, rank = 10, 4
    config = peft.AdaLoraConfig(
        init_r=rank, target_r=2, tinit=1, tfinal=3, total_step=steps, deltaT=1, orth_reg_weight=0, lora_alpha=4,
        target_modules=TARGETS, task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(0)
    theirs: Any = peft.get_peft_model(stories(), config)
    theirs.save_pretrained(tmp_path)
    ours = isotune.load(stories(), tmp_path, trainable=True)
    for row in adapters(ours):
        assert row.settings.keep == 0.5
        row.settings = row.settings.model_copy(update={"gamma": 0.0})
    ids = tokens(ours)["input_ids"]
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for k in range(1, steps + 1):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if model is theirs:
                theirs.base_model.update_and_allocate(k)
            else:
                isotune.after_step(ours, k / steps)
            optimizer.zero_grad()
    expected = {n: p for n, p in theirs.named_parameters() if "lora_E" in n}
    kept = 0
    for path, layer in ours.named_modules():
        if hasattr(layer, "isotune"):
            their = expected[f"base_model.model.{path}.lora_E.default"].flatten()
            torch.testing.assert_close(layer.isotune["default"].g, their, rtol=1e-3, atol=1e-6)
            kept += int((their != 0).sum())
    assert kept == 2 * len(expected)
    # What PEFT saves then has the ranks that are left.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "trained")
    assert_same_output(output(isotune.load(stories(), tmp_path / "trained").eval()), output(theirs.eval()))


def test_adalora_ranks_over_all_layers_and_keeps_as_many_as_it_says() -> None:
    model = isotune.adapt(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)),
        isotune.method("adalora", rank=4, keep=0.5, warmup=0.0, final=0.5),
        ["0", "1"],
        seed=0,
    )
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-2))
    left = []
    for k in range(10):
        step(model, optimizer, (k + 1) / 10)
        left.append(sum(int((adapter.g != 0).sum()) for adapter in adapters(model)))
    assert left == sorted(left, reverse=True)
    assert left[-1] == left[-5] == 4


def test_adalora_asks_for_gradients_and_for_time() -> None:
    model = adapted(stories(), isotune.method("adalora", rank=4), TARGETS)
    with pytest.raises(IsotuneError, match=r"between optimizer.step\(\) and optimizer.zero_grad\(\)"):
        isotune.after_step(model, 0.5)
    with pytest.raises(OptionError, match=r"warmup=0.5 and final=0.5 leave no time"):
        isotune.method("adalora", warmup=0.5, final=0.5)


def test_what_its_training_remembers_is_in_checkpoints_and_not_in_the_adapter(tmp_path: Path) -> None:
    def fresh() -> Any:
        torch.manual_seed(0)
        return isotune.adapt(
            nn.Sequential(nn.Linear(8, 6)), isotune.method("adalora", rank=5, gamma=0.02), ["0"], seed=0
        )

    model = fresh()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for k in range(3):
        step(model, optimizer, (k + 1) / 10)
    save_weights(model, tmp_path, "base")
    again = fresh()
    load_weights(again, tmp_path)
    state = again.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert model[0].isotune["default"].worth_A.any()
    loaded = isotune.load(nn.Sequential(nn.Linear(8, 6)), tmp_path / "adapter")
    assert not loaded[0].isotune["default"].worth_A.any()
