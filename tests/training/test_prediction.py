"""`predict`: rows without answers, some at a time, and files that are whole or not there."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_generation import TEMPLATE
from tiny import sentences, write_jsonl, write_recipe

from isotune.errors import DataError, IsotuneError, OptionError
from isotune.training import prediction
from isotune.training.evaluation import evaluate
from isotune.training.generation import generate
from isotune.training.lines import writing_lines
from isotune.training.opening import open_any
from isotune.training.prediction import predict
from isotune.training.recipe import DataSettings, build_recipe
from isotune.training.run import train
from isotune.training.session import TaskSpec
from isotune.training.tasks.causal import asked_in
from isotune.training.tasks.names import TASKS


@pytest.fixture(scope="module")
def finished(bert: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prediction")
    recipe = write_recipe(folder / "recipe.yaml", bert, rows, folder / "run", max_steps=12)
    return train(build_recipe(recipe), progress=False).output


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_labelled_rows_are_predicted_as_evaluating_does(finished: Path, rows: Path, tmp_path: Path) -> None:
    data = str(rows / "test.jsonl")
    evaluate(finished, data, predictions=tmp_path / "one.jsonl", progress=False)
    assert predict(finished, data, tmp_path / "two.jsonl", progress=False) == 15
    one, two = lines_of(tmp_path / "one.jsonl"), lines_of(tmp_path / "two.jsonl")
    for line in (*one, *two):
        line["probability"] = pytest.approx(line["probability"], rel=1e-4)
    assert [{**line, "probability": 0} for line in one] == [{**line, "probability": 0} for line in two]


def test_rows_keep_their_order_however_many_are_read_at_a_time(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = write_jsonl(tmp_path / "bare.jsonl", [{"text": row["text"]} for row in sentences(23, 5)])
    predict(finished, str(bare), tmp_path / "whole.jsonl", probabilities=True, progress=False)
    monkeypatch.setattr(prediction, "BATCHES", 2)
    predict(finished, str(bare), tmp_path / "parts.jsonl", batch_size=3, probabilities=True, progress=False)
    whole, parts = lines_of(tmp_path / "whole.jsonl"), lines_of(tmp_path / "parts.jsonl")
    assert [line["text"] for line in parts] == [row["text"] for row in sentences(23, 5)]
    for one, other in zip(whole, parts, strict=True):
        assert other["probabilities"] == pytest.approx(one["probabilities"], rel=1e-4)
        assert other["prediction"] == max(other["probabilities"], key=other["probabilities"].__getitem__)
        assert other["probability"] == max(other["probabilities"].values())
        assert sum(other["probabilities"].values()) == pytest.approx(1)


def test_a_row_that_cannot_be_read_leaves_the_older_file(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "BATCHES", 1)
    data = write_jsonl(tmp_path / "x.jsonl", [*({"text": "the cat"} for _ in range(4)), {"text": " "}])
    file = tmp_path / "told.jsonl"
    file.write_text("older\n")
    with pytest.raises(DataError, match="row 5 has nothing in column 'text'"):
        predict(finished, str(data), file, batch_size=2, progress=False)
    assert file.read_text() == "older\n"
    assert sorted(os.listdir(tmp_path)) == ["told.jsonl", "x.jsonl"]


def test_tables_have_lists_as_json(tmp_path: Path) -> None:
    with writing_lines(tmp_path / "x.csv") as write:
        write([{"text": ["a", "é"], "prediction": 1.5}])
        write([{"text": ["b"], "prediction": 2.5}])
    (one, other) = csv.DictReader((tmp_path / "x.csv").read_text().splitlines())
    assert (json.loads(one["text"]), one["prediction"]) == (["a", "é"], "1.5")
    assert json.loads(other["text"]) == ["b"]


@pytest.mark.parametrize(
    ("output", "more", "message"),
    [
        ("x.xlsx", {}, "name a .csv or a .jsonl file"),
        ("no/x.csv", {}, "no such folder"),
        ("x.csv", {"probabilities": True}, "write them to a .jsonl file"),
    ],
)
def test_what_cannot_be_written_is_said_first(
    finished: Path, tmp_path: Path, output: str, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(IsotuneError, match=message):
        predict(finished, "missing.jsonl", tmp_path / output, progress=False, **more)


def test_tags_come_with_the_entities_that_they_make() -> None:
    labels = ["O", "B-PER", "I-PER", "B-LOC"]
    spec = TaskSpec("token-classification", "", labels, "auto", 8, "\n", "float32", None)
    row = {"text": ["Ada", "Lovelace", "left", "London", "again"]}
    kept = [[[-100, 0, -100], [1, 0, 0], [2, 0, 0], [0, 0, 0], [3, 0, 0]]]
    (found,) = TASKS["token-classification"].predicted([row], kept, spec)  # type: ignore[arg-type]
    assert found["prediction"] == ["B-PER", "I-PER", "O", "B-LOC", None]
    assert found["entities"] == [
        {"kind": "PER", "text": "Ada Lovelace", "start": 0, "end": 1},
        {"kind": "LOC", "text": "London", "start": 3, "end": 3},
    ]


@pytest.mark.parametrize(
    ("task", "found", "wanted"),
    [
        ("causal-lm", ["id", "question"], ("question", "answer")),
        ("causal-lm", ["prompt"], ("prompt", "completion")),
        ("seq2seq-lm", ["document"], ("document", "summary")),
    ],
)
def test_prompts_alone_are_found_by_their_usual_names(task: str, found: list[str], wanted: tuple[str, str]) -> None:
    columns = TASKS[task].columns(DataSettings(train="x"), found)
    assert columns == {"prompt": [wanted[0]], "completion": [wanted[1]]}


def test_a_chat_is_gone_on_with_where_it_is_the_assistants_turn(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "talker"))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    user, assistant = ({"role": role, "content": "the cat"} for role in ("user", "assistant"))
    chats = [[user], [user, assistant, user], [user, assistant]]
    data = write_jsonl(tmp_path / "x.jsonl", [{"messages": chat} for chat in chats])
    predict(model, str(data), tmp_path / "told.jsonl", task="causal-lm", max_new_tokens=5, progress=False)
    session = open_any(model, "causal-lm")
    asked = [asked_in(chat, session.tokenizer) for chat in ([user], [user, assistant, user], [user])]
    told = lines_of(tmp_path / "told.jsonl")
    assert [line["prediction"] for line in told] == generate(session, asked, 5)
    assert [line["messages"] for line in told] == chats
    with pytest.raises(DataError, match="without a turn of the assistant's"):
        evaluate(model, str(data), task="causal-lm", progress=False)
    with pytest.raises(OptionError, match="no labels with probabilities"):
        predict(model, str(data), task="causal-lm", probabilities=True, progress=False)


def test_a_preference_tells_the_better_of_two_and_wants_both(llama: Path, tmp_path: Path) -> None:
    pair = {"prompt": "the cat", "chosen": "sees a dog", "rejected": "hen"}
    data = write_jsonl(tmp_path / "x.jsonl", [pair])
    assert predict(llama, str(data), tmp_path / "told.jsonl", task="preference", progress=False) == 1
    assert lines_of(tmp_path / "told.jsonl")[0]["margin"] == 0
    alone = write_jsonl(tmp_path / "y.jsonl", [{key: pair[key] for key in ("prompt", "rejected")}])
    with pytest.raises(DataError, match="row 1 has no chosen answer"):
        predict(llama, str(alone), tmp_path / "told.jsonl", task="preference", progress=False)
