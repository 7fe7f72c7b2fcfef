"""`isotune train`: flags, recipes, results, and one clear message for each mistake."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import make_bert, sentences, write_jsonl, write_recipe


def test_flags_alone_train_and_json_keeps_standard_output_clean(
    command: Callable[..., int], bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    code = command(
        "train", "--model", bert, "--data", rows / "train.jsonl", "--test", rows / "test.jsonl", "--text", "text",
        "--label", "label", "--method", "hra", "--rank", 2, "--targets", "query-value", "--output", run, "--seed", 3,
        "--set", "training.max_steps=4", "--set", "data.max_length=16", "--json",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    metrics = json.loads(out)
    assert metrics == json.loads((run / "metrics.json").read_text())
    assert {"test_accuracy", "test_macro_f1", "test_loss", "validation_loss", "train_loss"} <= metrics.keys()
    assert metrics["steps"] == 4
    assert metrics["seed"] == 3
    assert metrics["trainable_parameters_encoder"] == 2 * 2 * 32 * 2
    assert metrics["trainable_parameters"] == 2 * 2 * 32 * 2 + 2 * 33
    assert metrics["seconds_per_step"] > 0
    assert metrics["tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 10**7
    assert "hra's default" in err
    assert sorted(path.name for path in run.iterdir()) == [
        "adapter", "baselines.json", "checkpoint-4", "history.json", "metrics.json", "recipe.yaml", "report.html"
    ]  # fmt: skip


def test_prompts_and_completions_train_a_causal_model_from_flags(
    command: Callable[..., int], llama: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = command(
        "train", "--model", llama, "--task", "causal-lm", "--data", prompts, "--prompt", "question",
        "--completion", "answer", "--targets", "all-linear", "--rank", 2, "--output", tmp_path / "run",
        "--set", "training.max_steps=3", "--set", "data.max_length=32",
    )  # fmt: skip
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "validation_perplexity" in out


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def one_label(folder: Path) -> list[object]:
    return ["--data", write_jsonl(folder / "data.jsonl", [{"text": "cat", "label": "x"}] * 4)]


def unseen_label(folder: Path) -> list[object]:
    test = write_jsonl(folder / "test.jsonl", [{"text": "cat", "label": "mineral"}])
    return ["--test", test]


def empty_text(folder: Path) -> list[object]:
    rows = sentences(6, 0)
    rows[3]["text"] = "  "
    return ["--data", write_jsonl(folder / "data.jsonl", rows)]


def broken_json(folder: Path) -> list[object]:
    return ["--data", write_csv(folder / "data.jsonl", '{"text": "a", "label": "b"}\n{"text": \n')]


def without_weights(folder: Path) -> list[object]:
    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return ["--model", model]


def without_tokenizer(folder: Path) -> list[object]:
    for file in make_bert(folder / "model").glob("tokenizer*"):
        file.unlink()
    return ["--model", folder / "model"]


def not_a_model(folder: Path) -> list[object]:
    (folder / "model").mkdir()
    return ["--model", folder / "model"]


def misspelt_key(folder: Path) -> list[object]:
    return [write_csv(folder / "bad.yaml", "targtes: attention\n")]


def foreign_output(folder: Path) -> list[object]:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter1.txt").write_text("x")
    return ["--output", folder / "thesis"]


def file_as_output(folder: Path) -> list[object]:
    return ["--output", write_csv(folder / "file", "x")]


def arguments(*given: object) -> Callable[[Path], list[object]]:
    return lambda folder: list(given)


MISTAKES = {
    "missing data file": (lambda f: ["--data", f / "no.csv"], "no data file or folder at"),
    "empty data file": (lambda f: ["--data", write_csv(f / "e.csv", "")], "the file is empty"),
    "header without rows": (lambda f: ["--data", write_csv(f / "h.csv", "text,label\n")], "no rows"),
    "unknown column": (arguments("--text", "txet"), "no column 'txet' (data.text). Did you mean 'text'?"),
    "one label": (one_label, "every training row has the label 'x'"),
    "unseen label": (unseen_label, "row 1 of the test rows has the label 'mineral'"),
    "row without text": (empty_text, "row 4 has nothing in column 'text'"),
    "broken json": (broken_json, "cannot be read as json"),
    "unknown dataset": (arguments("--data", "nobody/nothing"), "the hub gave no dataset of that name"),
    "missing model": (lambda f: ["--model", f / "none"], "no model folder at"),
    "no model in the folder": (not_a_model, "it has no config.json"),
    "model without weights": (without_weights, "has no weights"),
    "model without tokenizer": (without_tokenizer, "has no tokenizer"),
    "unknown hub model": (arguments("--model", "nobody/nothing"), "nor a model the hub gave"),
    "missing recipe": (lambda f: [f / "no.yaml"], "no recipe file at"),
    "misspelt key": (misspelt_key, "bad.yaml: unknown key 'targtes'. Did you mean 'targets'?"),
    "misspelt nested key": (arguments("--set", "data.lable=x"), "'data.lable'. Did you mean 'label'?"),
    "misspelt training key": (
        arguments("--set", "training.learning_rat=1"),
        "unknown key 'training.learning_rat'. Did you mean 'learning_rate'?",
    ),
    "training value of a wrong kind": (arguments("--set", "training.max_steps=many"), "'training.max_steps'"),
    "set without a value": (arguments("--set", "method.rank"), "--set takes key=value"),
    "unknown task": (arguments("--task", "poetry"), "'seq2seq-lm' or 'preference'"),
    "unknown method": (arguments("--method", "hre"), "'hra'"),
    "unknown option": (arguments("--set", "method.rnak=4"), "'rank'"),
    "rank zero": (arguments("--rank", 0), "rank"),
    "rank larger than the layer": (arguments("--rank", 64), "64"),
    "odd rank with a paired start": (arguments("--rank", 3), "odd"),
    "unknown target": (arguments("--targets", "attenshun"), "attenshun"),
    "too long": (arguments("--set", "data.max_length=4096"), "reads at most 64 tokens"),
    "folder of somebody else's": (foreign_output, "holds no isotune run"),
    "output is a file": (file_as_output, "is a file, not a folder"),
    "output not writable": (arguments("--output", "/proc/isotune-run"), "cannot be written"),
    "nothing to resume": (arguments("--resume"), "nothing to resume"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_exit_code_2_and_writes_nothing(
    command: Callable[..., int],
    bert: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    make, message = MISTAKES[mistake]
    mistaken = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    good = {"--model": bert, "--data": rows / "train.jsonl", "--output": tmp_path / "run", "--rank": 2}
    rest = [part for flag, value in good.items() if flag not in mistaken for part in (flag, value)]
    code = command("train", *mistaken, *rest)
    out, err = capsys.readouterr()
    assert code == 2, err
    told = [line for line in err.splitlines() if line.startswith("isotune: ")]
    assert len(told) == 1
    assert message in err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_in_the_output_is_kept_unless_overwrite_is_given(
    command: Callable[..., int], bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "r.yaml", bert, rows, tmp_path / "run", max_steps=2)
    assert command("train", recipe) == 0
    before = (tmp_path / "run" / "metrics.json").read_bytes()
    assert command("train", recipe) == 2
    assert "--resume" in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.json").read_bytes() == before
    assert command("train", recipe, "--overwrite", "--set", "training.max_steps=3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


def test_the_resolved_recipe_is_kept_with_the_learning_rate_that_was_used(
    command: Callable[..., int], bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with gzip.open("data.csv.gz", "wt") as file:
        file.write("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in sentences(24, 5)))
    code = command(
        "train", "--model", bert, "--data", "data.csv.gz", "--rank", 2, "--output", "run",
        "--set", "training.max_steps=1", "--set", "head=random",
    )  # fmt: skip
    assert code == 0
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert recipe["data"]["train"] == str(tmp_path / "data.csv.gz")
    assert recipe["training"]["learning_rate"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.csv.gz", "run"]


def test_help_teaches_by_examples_and_imports_nothing_heavy() -> None:
    import subprocess

    script = (
        "import sys; sys.argv = ['isotune', 'train', '--help']\n"
        "from isotune.cli.app import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([name for name in ('transformers', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "Examples" in done.stdout
    assert done.stdout.strip().endswith("[]")
