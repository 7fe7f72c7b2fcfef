"""`isotune inspect` and `isotune mitigate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import isotune
from isotune import HRA, LoRA
from isotune.diagnostics import diagnose
from support import STORIES, adapted, stories

Command = Callable[..., int]


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LoRA's run, an HRA's, and one of full training, all of stories260K, in the working folder."""
    for name, settings in (("lora-run", LoRA(rank=4)), ("hra-run", HRA(rank=4))):
        isotune.save(adapted(stories(), settings, "query-value", size=0.3), tmp_path / name / "adapter")
    model = stories()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "full-run/model")
    (tmp_path / "full-run/model/task.json").write_text(json.dumps({"model": str(STORIES)}))
    (tmp_path / "my-base").symlink_to(STORIES)
    (tmp_path / "my-tuned-model").symlink_to(tmp_path / "full-run/model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folders")
def test_three_runs_are_shown_side_by_side(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", "lora-run", "hra-run", "full-run", "--side", "both") == 0
    out = " ".join(capsys.readouterr().out.split())
    for name in ("lora-run", "hra-run", "full-run"):
        assert f"{name}: the change of each layer" in out
        assert str(diagnose(name, side="both").total.intruders) in out
    assert "lora-run / full-run" in out
    assert "A count is no verdict" in out
    assert "left out, embeddings" in out


@pytest.mark.usefixtures("folders")
def test_json_is_one_diagnosis_or_a_survey(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        command("inspect", "lora-run", "--json", "--k", "3", "--threshold", "0.7", "--norms", "--length", "64") == 0
    )
    one = json.loads(capsys.readouterr().out)
    assert one["settings"] == {"k": 3, "threshold": 0.7, "side": "left"}
    assert one["total"]["intruders"] == diagnose("lora-run", k=3, threshold=0.7).total.intruders
    assert [bound["layer"] for bound in one["norm_bounds"]] == [f"model.layers.{i}.self_attn" for i in range(5)]
    assert command("inspect", "lora-run", "hra-run", "--json", "--fast") == 0
    both = json.loads(capsys.readouterr().out)
    assert [diagnosis["path"] for diagnosis in both["diagnoses"]] == ["lora-run", "hra-run"]
    assert both["overlaps"][0]["models"] == ["lora-run", "hra-run"]
    assert both["diagnoses"][0]["sites"][0]["intruders"] is None


@pytest.mark.usefixtures("folders")
def test_bounds_are_shown_without_a_verdict(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("inspect", "lora-run", "--norms", "--fast") == 0
    out = capsys.readouterr().out
    assert "what enters attention can be no larger than" in out
    assert "efficient" not in out


def test_a_mitigated_run_is_written_and_said(
    command: Command, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = diagnose("lora-run").total.intruders
    assert command("mitigate", "lora-run", "--output", "calmer", "--factor", "0.5", "--rank", "same") == 0
    assert f"calmer: {count} intruders times 0.5" in capsys.readouterr().out
    assert command("mitigate", "lora-run", "--output", "calmer", "--factor", "0.5", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["factor"] == 0.5
    assert sum(map(len, said["intruders"].values())) == count
    assert (folders / "calmer" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "lora-run", "--k", "0"], "k=0 is not usable"),
        (["inspect", "lora-run", "--side", "top"], "choose left, right or both"),
        (["inspect", "lora-run", "--length", "9"], "--length goes with --norms"),
        (["inspect", "lora-run", "nowhere"], "there is no adapter folder nowhere"),
        (["inspect", "."], "is no adapter, no run and no model"),
        (["inspect", "my-base"], "can only be measured against the one that it started from"),
        (["inspect", "full-run", "--base", "./no-such-base"], "./no-such-base"),
        (["mitigate", "full-run", "--output", "out"], "is a full model"),
        (["mitigate", "lora-run", "--output", "out", "--rank", "most"], "say exact, same, or a number"),
        (["mitigate", "lora-run", "--output", "out", "--factor", "-2"], "factor=-2 is not usable"),
    ],
)
def test_a_mistake_is_one_message_and_writes_nothing(
    command: Command, folders: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folders.iterdir())
    assert command(*arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert sorted(folders.iterdir()) == before
