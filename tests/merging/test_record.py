"""What a merge says of itself is read back, from this version's files and from older ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from isotune.errors import IsotuneError
from isotune.merging.record import (
    CompressedAdapters,
    MergedAdapter,
    MergedModel,
    MergeRecord,
    MovedSkill,
    read_record,
)

RECORDS = [
    MergedAdapter(rule="ties", models={"a": 1.0, "b": 0.5}, ranks={"q": 4}, errors={"q": 0.1}, error=0.1),
    MergedModel(rule="linear", models={"a": 1.0}, folders=["here/a"], changed=3, notes=["other dtypes"]),
    CompressedAdapters(rule="rmm", models={"a": 1.0}, errors={"a": 0.01}, values=3, separate_values=9),
    MovedSkill(rule="symmetry", models={"a": 1.0, "b": 0.5}, before=3.0, left_out={"lm_head.weight": "another size"}),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.kind)
def test_what_was_written_is_read_as_it_was(record: MergeRecord, tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_text(record.text())
    assert read_record(tmp_path) == record.model_copy(update={"path": tmp_path})


def test_a_folder_that_no_merge_wrote_has_no_record(tmp_path: Path) -> None:
    assert read_record(tmp_path) is None


def test_an_older_record_of_adapters_is_read(tmp_path: Path) -> None:
    older = {
        "path": None,
        "rule": "ties",
        "options": {"density": 0.2},
        "models": {"a": 1.0},
        "ranks": {"q": 4},
        "errors": {"q": 0.1},
        "error": 0.1,
        "norms": {"q": 2.0},
        "modules": [],
        "notes": [],
        "seconds": 1.5,
    }
    (tmp_path / "merge.json").write_text(json.dumps(older))
    found = read_record(tmp_path)
    assert isinstance(found, MergedAdapter)
    assert (found.models, found.norms, found.seconds, found.isotune) == ({"a": 1.0}, {"q": 2.0}, 1.5, None)


def test_an_older_record_of_full_models_is_read(tmp_path: Path) -> None:
    models = [{"name": "a", "folder": "x/a", "weight": 0.3}, {"name": "b", "folder": "x/b", "weight": 0.7}]
    older = {
        "rule": "linear",
        "options": {},
        "base": "x/base",
        "models": models,
        "seed": 2,
        "vocabulary": "intersect",
        "factor": 1.0,
        "changed": 7,
        "notes": [],
        "isotune": "0.1",
        "torch": "2.13.0",
    }
    (tmp_path / "merge.json").write_text(json.dumps(older))
    found = read_record(tmp_path)
    assert isinstance(found, MergedModel)
    assert (found.models, found.folders) == ({"a": 0.3, "b": 0.7}, ["x/a", "x/b"])
    assert (found.base, found.vocabulary, found.changed, found.isotune) == ("x/base", "intersect", 7, "0.1")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"kind": "soup", "rule": "sum"}', '{"rule": "sum", "models": [1]}']
)
def test_a_damaged_record_is_one_clear_error(text: Any, tmp_path: Path) -> None:
    (tmp_path / "merge.json").write_text(text)
    with pytest.raises(IsotuneError, match=r"merge\.json is no record of a merge"):
        read_record(tmp_path)
