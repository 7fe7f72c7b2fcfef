"""What is particular to Poly and MHR: skills mixed by task and by head, and tasks that come later."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import isotune
from both_ways import by_peft, through_peft
from isotune.errors import IsotuneError, OptionError
from support import STORIES, adapted, assert_same_output, move, output, stories

TASKS = ("a", "b", "c")
IDS = torch.arange(5, 25).view(4, 5)


def poly(size: float = 0.3, **options: Any) -> Any:
    method = isotune.method("poly", **{"rank": 2, "skills": 3, "tasks": TASKS, **options})
    return adapted(stories(), method, ["q_proj", "down_proj"], size=size)


def by_hand(adapter: Any, x: Tensor, task: int) -> Tensor:
    """The change for rows x (n, in), head by head and skill by skill."""
    q, S, _, r = adapter.A.shape
    z, shares = x.new_zeros(len(x), r), []
    for head, part in enumerate(x.chunk(q, dim=1)):
        odds = [1 / (1 + float(torch.exp(-adapter.z[task, head, s].detach()))) for s in range(S)]
        shares.append([odd / sum(odds) for odd in odds])
        for s in range(S):
            z = z + shares[head][s] * (part @ adapter.A[head, s])
    outs = [sum(shares[h][s] * (z @ adapter.B[h, s]) for s in range(S)) for h in range(q)]
    return torch.cat(outs, dim=1) / r  # type: ignore[arg-type]


@pytest.mark.parametrize("heads", [1, 4])
def test_rows_of_several_tasks_are_those_of_each_alone(heads: int) -> None:
    model = poly(heads=heads)
    layer = model.model.layers[0].self_attn.q_proj
    adapter, x = layer.isotune["default"], torch.randn(4, 5, 64)
    isotune.use_task(model, ["b", "a", "b", "c"])
    together = layer(x)
    for row, task in enumerate((1, 0, 1, 2)):
        expected = nn.functional.linear(x[row], layer._parameters["weight"]) + by_hand(adapter, x[row], task)
        assert_same_output(together[row], expected)
    mixed = output(model, input_ids=IDS)
    for row, task in enumerate("babc"):
        isotune.use_task(model, task)
        assert_same_output(output(model, input_ids=IDS[row : row + 1])[0], mixed[row])


def test_heads_that_mix_alike_are_poly_and_one_skill_is_a_lora() -> None:
    torch.manual_seed(0)
    models = {
        q: isotune.adapt(
            nn.Sequential(nn.Linear(8, 6)), isotune.method("poly", rank=2, skills=3, heads=q), ["0"], seed=0
        )
        for q in (1, 2)
    }
    one, two = (move(models[q], size=0.5)[0].isotune["default"] for q in (1, 2))
    with torch.no_grad():
        two.A.copy_(one.A.reshape(3, 2, 4, 2).transpose(0, 1))
        two.B.copy_(one.B.reshape(3, 2, 2, 3).permute(2, 0, 1, 3))
        two.z.copy_(one.z.expand(1, 2, 3))
    W = torch.randn(6, 8)
    torch.testing.assert_close(one.weight(W), two.weight(W))
    single = isotune.adapt(
        nn.Sequential(nn.Linear(8, 6)), isotune.method("poly", rank=2, skills=1, alpha=2.0), ["0"], seed=0
    )
    adapter = move(single, size=0.5)[0].isotune["default"]
    torch.testing.assert_close(adapter.weight(W), W + adapter.B[0, 0].mT @ adapter.A[0, 0].mT)


def test_evaluation_is_deterministic_and_training_samples_the_weights_alone() -> None:
    model = isotune.use_task(poly(), "a")
    assert torch.equal(output(model), output(model))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    assert not torch.equal(output(model), output(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    steady = isotune.use_task(poly(sample=False), "a").train()
    assert torch.equal(output(steady), output(steady))


def test_one_task_is_one_lora_that_folds_and_exports(tmp_path: Path) -> None:
    model = poly(heads=2)
    with pytest.raises(IsotuneError, match=r"poly mixes its skills by task.*it has a, b, c"):
        output(model)
    with pytest.raises(IsotuneError, match="poly mixes its skills by task"):
        isotune.export_lora(model, tmp_path / "none")
    isotune.use_task(model, "b")
    expected = output(model)
    isotune.export_lora(model, tmp_path / "b")
    exported = isotune.load(stories(), tmp_path / "b").eval()
    assert_same_output(output(exported), expected)
    assert all(row.trainable for row in isotune.describe(exported))
    isotune.save(model, tmp_path / "poly")
    isotune.export_lora(tmp_path / "poly", tmp_path / "c", base=STORIES, task="b")
    assert_same_output(output(isotune.load(stories(), tmp_path / "c").eval()), expected)
    with pytest.raises(OptionError, match=r"no task 'd'.*It has: a, b"):
        isotune.export_lora(tmp_path / "poly", tmp_path / "d", base=STORIES, task="d")
    isotune.save(isotune.adapt(stories(), isotune.LoRA(rank=2)), tmp_path / "lora")
    with pytest.raises(OptionError, match="lora mixes nothing by task"):
        isotune.export_lora(tmp_path / "lora", tmp_path / "d", base=STORIES, task="b")
    assert not (tmp_path / "d").exists()
    isotune.fold(model)
    assert_same_output(output(model), expected)
    isotune.unfold(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    alone = [isotune.use_task(model, task).generate(IDS[:1], **options)[0].tolist() for task in "ac"]
    together = isotune.use_task(model, ["a", "c"]).generate(IDS[:1].repeat(2, 1), **options)
    assert [row.tolist()[: len(one)] for row, one in zip(together, alone, strict=True)] == alone


def test_a_task_that_comes_later_learns_its_mix_alone(tmp_path: Path) -> None:
    model = poly(size=0.5)
    before = {task: output(isotune.use_task(model, task)) for task in TASKS}
    adapters = [m.isotune["default"] for m in model.modules() if hasattr(m, "isotune")]
    kept = [(a.A.clone(), a.B.clone(), a.z.clone()) for a in adapters]
    isotune.add_task(model, "new")
    optimizer = torch.optim.AdamW(isotune.parameter_groups(model, lr=1e-3, weight_decay=0.1))
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 3 * len(adapters)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    losses = []
    for _ in range(5):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        isotune.after_step(model)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    for adapter, (A, B, z) in zip(adapters, kept, strict=True):
        assert torch.equal(adapter.A, A)
        assert torch.equal(adapter.B, B)
        assert torch.equal(adapter.z, z)
    for task, expected in before.items():
        assert torch.equal(output(isotune.use_task(model.eval(), task)), expected)
    twin = copy.deepcopy(model)
    isotune.save(model, tmp_path / "adapter")
    loaded = isotune.load(stories(), tmp_path / "adapter").eval()
    for other in (twin, loaded):
        assert torch.equal(output(isotune.use_task(other, "new")), output(isotune.use_task(model, "new")))
    isotune.add_task(model, "another")
    assert torch.equal(output(isotune.use_task(model.eval(), "new")), output(isotune.use_task(loaded, "new")))


def test_a_uniform_router_is_the_mean_of_the_skills() -> None:
    model = poly(router="uniform")
    adapter, W = model.model.layers[0].self_attn.q_proj.isotune["default"], torch.randn(64, 64)
    A, B = adapter.A[0].mean(0), adapter.B[0].mean(0)
    torch.testing.assert_close(adapter.weight(W), W + (A @ B).mT / 2)
    with pytest.raises(IsotuneError, match="no mix of skills to learn"):
        isotune.add_task(model, "new")


def test_peft_goes_both_ways(tmp_path: Path) -> None:
    config = peft.PolyConfig(
        r=2, n_tasks=3, n_skills=3, n_splits=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    theirs = by_peft(stories(), config, tmp_path / "theirs")
    ours = isotune.load(stories(), tmp_path / "theirs").eval()
    found = []
    for task in range(3):
        with torch.no_grad():
            expected = theirs.eval()(input_ids=IDS, task_ids=torch.full((4,), task)).logits
        isotune.use_task(ours, str(task))
        assert_same_output(output(ours, input_ids=IDS), expected)
        found.append(expected)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    isotune.save(ours, tmp_path / "ours")
    again = through_peft(stories(), tmp_path / "ours")
    with torch.no_grad():
        rows = again(input_ids=IDS, task_ids=torch.tensor([2, 0, 1, 0])).logits
    isotune.use_task(ours, ["2", "0", "1", "0"])
    assert_same_output(output(ours, input_ids=IDS), rows)
    other = isotune.use_task(poly(router="uniform"), None)
    isotune.save(other, tmp_path / "own")
    assert "ISOTUNE_POLY" in (tmp_path / "own" / "adapter_config.json").read_text()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(OptionError, match="3 heads do not divide a layer of 64 inputs"):
        poly(heads=3)
    with pytest.raises(OptionError, match="a task is named twice"):
        poly(tasks=("a", "a"))
    model = poly()
    with pytest.raises(IsotuneError, match=r"poly has no task 'd'.*It has: a, b, c"):
        isotune.use_task(model, ["a", "d"])
    with pytest.raises(IsotuneError, match="has a task 'a' already"):
        isotune.add_task(model, "a")
    isotune.use_task(model, ["a", "b", "c"])
    with pytest.raises(IsotuneError, match=r"the tasks of 3 rows.*\(4, 5, 64\)"):
        output(model, input_ids=IDS)
    with pytest.raises(IsotuneError, match="no adapter in use mixes by task"):
        isotune.use_task(adapted(stories(), isotune.LoRA(rank=2), ["q_proj"]), "a")
