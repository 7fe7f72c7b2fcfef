"""Mitigation: intruders scaled down, in a new adapter that loads everywhere."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor

import isotune
from isotune import HRA, LoRA
from isotune.diagnostics import diagnose, mitigate
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.linalg.low_rank import dense_svd
from isotune.model.names import adapted_layers
from isotune.sites import require_site
from support import MINILM, STORIES, adapted, assert_same_output, files, minilm, output, stories

SIZE = 0.4  # at which LoRA's columns become leading directions


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return isotune.save(adapted(stories(), LoRA(rank=4), "attention", size=SIZE), tmp_path / "lora")


def changes(folder: Path) -> dict[str, Tensor]:
    """The dense change of every layer."""
    model = isotune.load(stories(), folder)
    return {p: layer.weight.detach() - require_site(layer, "").weight for p, layer in adapted_layers(model)}


@pytest.mark.parametrize("factor", [0.0, 0.75, 1.5])
def test_the_new_change_is_the_old_one_with_the_intruders_scaled(lora: Path, factor: float, tmp_path: Path) -> None:
    done = mitigate(lora, tmp_path / "out", factor)
    assert sum(map(len, done.intruders.values())) == diagnose(lora).total.intruders
    old, new, layers = changes(lora), changes(tmp_path / "out"), dict(stories().named_modules())
    for path, found in done.intruders.items():
        W = layers[path].weight.detach()
        U, S, V = dense_svd(W + old[path])
        index = [j - 1 for j in found]
        expected = old[path] + (factor - 1) * (U[:, index] * S[index]) @ V[:, index].mT
        torch.testing.assert_close(new[path], expected, rtol=0, atol=1e-5 * float(S[0]))
        assert done.ranks[path] == 4 + len(found)
    assert done.error < 1e-6


def test_scaled_intruders_stay_singular_values_of_the_weight(lora: Path, tmp_path: Path) -> None:
    done = mitigate(lora, tmp_path / "out", 0.9)
    before = {site.site: site for site in diagnose(lora).sites}
    after = {site.site: site for site in diagnose(tmp_path / "out", k=20).sites}
    for path, found in done.intruders.items():
        values = torch.tensor(after[path].adapted_values)
        for j in found:
            scaled = 0.9 * (before[path].adapted_values or [])[j - 1]
            assert float((values - scaled).abs().min()) < 1e-4 * scaled


def test_a_factor_of_one_gives_the_same_adapter(lora: Path, tmp_path: Path) -> None:
    done = mitigate(lora, tmp_path / "out", 1.0)
    assert set(done.ranks.values()) == {4}
    assert done.moved == done.error == 0
    old, new = changes(lora), changes(tmp_path / "out")
    assert all(new[path].equal(old[path]) for path in old)


def test_without_intruders_nothing_changes(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "attention", size=0.001), tmp_path / "small")
    done = mitigate(tmp_path / "small", tmp_path / "out", 0.0)
    assert done.intruders == {}
    old, new = changes(tmp_path / "small"), changes(tmp_path / "out")
    assert all(new[path].equal(old[path]) for path in old)


@pytest.mark.parametrize("rank", ["same", 2, 6])
def test_a_smaller_rank_reports_what_it_cut_off(lora: Path, rank: Any, tmp_path: Path) -> None:
    exact = mitigate(lora, tmp_path / "exact", 0.5)
    done = mitigate(lora, tmp_path / "out", 0.5, rank=rank)
    wanted = 4 if rank == "same" else rank
    assert all(own == min(wanted, exact.ranks[path]) for path, own in done.ranks.items())
    full, cut = changes(tmp_path / "exact"), changes(tmp_path / "out")
    for path, error in done.errors.items():
        assert error == pytest.approx(float((cut[path] - full[path]).norm() / full[path].norm()), abs=1e-5)
    assert done.error > 1e-3


def test_intruders_of_a_rotation_are_scaled_by_a_lora_which_peft_loads(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), HRA(rank=8), "attention", size=0.3), tmp_path / "hra")
    done = mitigate(tmp_path / "hra", tmp_path / "out", 0.5, side="right", threshold=0.9)
    assert done.intruders
    ours = isotune.load(stories(), tmp_path / "out")
    theirs = peft.PeftModel.from_pretrained(stories(), str(tmp_path / "out"))
    assert_same_output(output(ours), output(theirs))
    assert not torch.allclose(output(ours), output(isotune.load(stories(), tmp_path / "hra")), atol=1e-3)


def test_what_lies_beside_the_adapter_is_kept(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=4), "attention", size=SIZE, train_also=["norm"])
    run = tmp_path / "run"
    isotune.save(model, run / "adapter")
    (run / "recipe.yaml").write_text("# A resolved isotune recipe: ...\n")
    (run / "adapter" / "task.json").write_text('{"task": "causal-lm"}')
    mitigate(run, tmp_path / "out", 1.0)
    assert_same_output(output(isotune.load(stories(), tmp_path / "out")), output(model))
    assert (tmp_path / "out/task.json").read_text() == '{"task": "causal-lm"}'
    said = json.loads((tmp_path / "out/mitigation.json").read_text())
    assert said["factor"] == 1.0
    assert said["source"] == str(run)


def test_pefts_mitigation_is_ours_where_it_cuts_nothing_off_and_truncates_in_silence_elsewhere(
    tmp_path: Path,
) -> None:
    model = peft.get_peft_model(stories(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"]))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs/adapter_config.json"
    config.write_text(
        config.read_text().replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{STORIES}"')
    )

    def of_theirs(factor: float) -> dict[str, Tensor]:
        changed = copy.deepcopy(model)
        reduce_intruder_dimension(changed, mitigation_lambda=factor, logging_sink=None)
        return {
            name.removeprefix("base_model.model."): layer.get_delta_weight("intruder_reduced").detach()
            for name, layer in changed.named_modules()
            if hasattr(layer, "get_delta_weight")
        }

    for factor in (0.75, 0.0):
        theirs = of_theirs(factor)
        exact = mitigate(tmp_path / "theirs", tmp_path / "exact", factor)
        same = mitigate(tmp_path / "theirs", tmp_path / "same", factor, rank="same")
        assert exact.intruders
        cut, full = changes(tmp_path / "same"), changes(tmp_path / "exact")
        for path, delta in theirs.items():
            scale = float(full[path].norm())
            torch.testing.assert_close(delta, cut[path], rtol=0, atol=1e-4 * scale)
            # Of the exact change they lose, without saying so, what we report.
            assert float((delta - full[path]).norm()) / scale == pytest.approx(same.errors[path], abs=1e-4)
        assert same.error > (0.05 if factor == 0 else 0.001)
    # Their docstring has it that a larger lambda takes away more; it is the other way round.
    base = of_theirs(1.0)
    assert float((of_theirs(0.9)[path] - base[path]).norm()) < float((theirs[path] - base[path]).norm())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"factor": -1.0}, "factor=-1 is not usable"),
        ({"factor": float("nan")}, "factor=nan is not usable"),
        ({"rank": 0}, "rank=0 is not usable"),
        ({"rank": "half"}, "say exact, same, or a number"),
        ({"k": 0}, "k=0 is not usable"),
        ({"base": "no/such-base/here"}, "no/such-base/here"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    lora: Path, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(IsotuneError, match=says):
        mitigate(lora, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_mitigated_is_refused(lora: Path, tmp_path: Path) -> None:
    before = files(lora)
    with pytest.raises(OptionError, match="is the adapter itself"):
        mitigate(lora, lora)
    with pytest.raises(CheckpointError, match="is a full model"):
        mitigate(STORIES, tmp_path / "out", base=STORIES)
    isotune.save(adapted(stories(), isotune.method("oft", block=8), "attention"), tmp_path / "oft")
    with pytest.raises(OptionError, match="oft has no exact low-rank form"):
        mitigate(tmp_path / "oft", tmp_path / "out")
    isotune.save(adapted(stories(), LoRA(rank=2), "attention"), tmp_path / "lost", base_model="no/such-base")
    with pytest.raises(CheckpointError, match="no/such-base, which is not at hand; name it with"):
        mitigate(tmp_path / "lost", tmp_path / "out")
    isotune.save(adapted(minilm(), isotune.method("road"), ["query"]), tmp_path / "road")
    with pytest.raises(CheckpointError, match="road also changes the bias"):
        mitigate(tmp_path / "road", tmp_path / "out", base=MINILM)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="holds something else"):
        mitigate(lora, tmp_path / "other")
    assert not (tmp_path / "out").exists()
    assert files(lora) == before


def test_a_change_without_factors_is_mitigated_at_a_given_rank(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), isotune.method("oft", block=8), "attention", size=0.3), tmp_path / "oft")
    done = mitigate(tmp_path / "oft", tmp_path / "out", 0.5, rank=12, side="right")
    assert set(done.ranks.values()) == {12}
    assert 0 < done.error < 1
