"""The example of missing modalities: what is missing is zero, and rows of all cases may share a batch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

import isotune
from examples import ROOT, load_script

SPLITS = {"train": 96, "validation": 30, "test": 30}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, with one short epoch and one rate."""
    found = load_script(ROOT / "examples/missing-modality/run.py", monkeypatch)
    for name, value in {"EPOCHS": 1, "ROWS": 16, "NETWORK_RATES": (3e-3,), "ADAPTER_RATES": (2e-2,)}.items():
        monkeypatch.setattr(found, name, value)
    return found


@pytest.fixture
def features(tmp_path: Path) -> Path:
    """A file as make_features.py writes it: three classes, around whose centres the rows of both modalities lie."""
    draw, tensors = torch.Generator().manual_seed(0), {}
    centres = {"image": torch.randn(3, 8, generator=draw), "sound": torch.randn(3, 12, generator=draw)}
    for split, number in SPLITS.items():
        tensors[f"{split}.label"] = labels = torch.arange(number) % 3
        for what, centre in centres.items():
            tensors[f"{split}.{what}"] = 5 + centre[labels] + torch.randn(number, centre.shape[1], generator=draw)
    save_file(tensors, tmp_path / "features.safetensors")
    return tmp_path / "features.safetensors"


def test_what_is_missing_is_zero_and_the_rest_stays(script: ModuleType, features: Path) -> None:
    data = script.read(features)["test"][slice(0, 3)]
    some = data.lacking(["both", "image alone", "sound alone"])
    assert torch.equal(some.image, torch.stack([data.image[0], data.image[1], torch.zeros(8)]))
    assert torch.equal(some.sound, torch.stack([data.sound[0], torch.zeros(12), data.sound[2]]))


def test_adapters_for_a_case_leave_the_other_cases_as_they_were(script: ModuleType, features: Path) -> None:
    data = script.read(features)
    model = script.network(data, ["both"], 0)
    test = data["test"]
    before = {case: model.eval()(*_inputs(test, case)) for case in script.CASES}
    names = script.add_sets(model, script.METHODS["ssf for each case"], data, 0)
    assert set(names) == {"image alone", "sound alone"}
    model.eval()
    with isotune.disabled(model):
        assert torch.equal(model(*_inputs(test, "both")), before["both"])
    for case, name in names.items():
        isotune.use(model, name)
        assert not torch.allclose(model(*_inputs(test, case)), before[case], atol=1e-3)


def test_a_batch_of_all_cases_is_compared_with_batches_of_one(script: ModuleType, features: Path) -> None:
    data = script.read(features)
    for method in script.METHODS.values():
        model = script.network(data, ["both"], 0)
        both = script.accuracy(model, data["test"], "both")
        names = script.add_sets(model, method, data, 0)
        found = script.accuracy_by_row(model, data["test"], names, 0)
        assert found["both"] == both
        for case, name in names.items():
            isotune.use(model, name)
            assert found[case] == script.accuracy(model, data["test"], case)


def test_a_row_with_the_wrong_adapters_is_noticed(
    script: ModuleType, features: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = script.read(features)
    model = script.network(data, ["both"], 0)
    names = script.add_sets(model, script.METHODS["ssf for each case"], data, 0)
    use = isotune.use

    def forgetful(model: torch.nn.Module, name: str | None = None, rows: list[str | None] | None = None) -> None:
        use(model, name) if rows is None else use(model, rows=[None] * len(rows))

    monkeypatch.setattr(isotune, "use", forgetful)
    with pytest.raises(RuntimeError, match="mixed batch"):
        script.accuracy_by_row(model, data["test"], names, 0)


def test_the_table_has_every_way(
    script: ModuleType, features: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = features.parent / "results.json"
    monkeypatch.setattr(sys, "argv", ["run.py", str(features), "--output", str(output), "--seeds", "0", "1"])
    script.main()
    rows = json.loads(output.read_text())
    assert {row["seed"] for row in rows} == {0, 1}
    assert len(rows) == 10
    # The layers' outputs, 64 + 64 + 128 + 128, each with a scale and a shift.
    assert {row["numbers"] for row in rows if row["way"] == "ssf for each case"} == {768}
    printed = capsys.readouterr().out
    assert all(f"| {row['way']} | {row['numbers']:,} |" in printed for row in rows)


def _inputs(data: object, case: str) -> tuple[torch.Tensor, torch.Tensor]:
    found = data.lacking([case] * len(data))  # type: ignore[attr-defined,arg-type]
    return found.image, found.sound
