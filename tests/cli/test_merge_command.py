"""`isotune merge`, `recover`, `rules` and `statistics`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import make_bert, write_recipe
from transformers import AutoModel

import isotune
from isotune import HRA, LoRA
from isotune.checkpoint.read import read_stored
from isotune.merging.registry import rule_names
from isotune.training import build_recipe, train
from support import adapted

Command = Callable[..., int]
DOCS = Path(__file__).parents[2] / "docs" / "rules.md"


@pytest.fixture(scope="module")
def folders(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two LoRAs and two HRAs of one small model."""
    folder = tmp_path_factory.mktemp("adapters")
    methods = {"a": LoRA(rank=2), "b": LoRA(rank=3), "h1": HRA(rank=2), "h2": HRA(rank=2)}
    return {
        name: isotune.save(adapted(AutoModel.from_pretrained(bert), method, ["query"], seed=seed), folder / name)
        for seed, (name, method) in enumerate(methods.items())
    }


@pytest.fixture
def a(folders: dict[str, Path]) -> Path:
    return folders["a"]


@pytest.fixture
def b(folders: dict[str, Path]) -> Path:
    return folders["b"]


def test_flags_alone_merge_and_json_keeps_standard_output_clean(
    command: Command, a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    code = command(
        "merge", a, b, "--rule", "ties", "--weights", "1,0.5", "--set", "density=0.3", "--out", out, "--json"
    )
    text, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(text)
    assert found["path"] == str(out)
    assert found["models"] == {"a": 1.0, "b": 0.5}
    assert found["options"]["density"] == 0.3
    assert set(found["ranks"].values()) == {5}
    assert 0 < found["error"] < 1
    assert json.loads((out / "merge.json").read_text()) | {"path": str(out)} == found
    assert read_stored(out).method == "lora"


def test_the_result_is_a_table_for_people(
    command: Command, a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("merge", a, b, "--weights=1,-0.5", "--names", "x,y", "--rank", 2, "--out", tmp_path / "out") == 0
    text, _ = capsys.readouterr()
    assert "2 adapters merged by sum" in text
    assert "encoder.layer.0.attention.self.query" in text
    assert "weights x 1, y -0.5" in text


def test_a_recipe_says_the_same_and_flags_go_over_it(
    command: Command, a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    models: list[Any] = [str(a), {"path": str(b), "weight": 0.5}]
    recipe.write_text(yaml.safe_dump({"models": models, "rule": "ties", "output": str(tmp_path / "one")}))
    assert command("merge", recipe, "--set", "density=0.3", "--seed", 1) == 0
    flags = ["--rule", "ties", "--weights", "1,0.5", "--set", "density=0.3", "--seed", 1, "--out", tmp_path / "two"]
    assert command("merge", a, b, *flags) == 0
    one, two = (json.loads((tmp_path / name / "merge.json").read_text()) for name in ("one", "two"))
    assert one | {"seconds": 0} == two | {"seconds": 0}
    capsys.readouterr()
    assert command("merge", recipe, "--rule", "linear", "--out", tmp_path / "three", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rule"] == "linear"


def test_rotations_are_merged_as_rotations(command: Command, folders: dict[str, Path], tmp_path: Path) -> None:
    assert command("merge", folders["h1"], folders["h2"], "--rule", "karcher", "--out", tmp_path / "out") == 0
    assert read_stored(tmp_path / "out").method == "hra"


def test_explain_tells_and_writes_nothing(
    command: Command,
    a: Path,
    b: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("merge", a, b, "--explain") == 0
    text, _ = capsys.readouterr()
    for word in ("cosine", "sign conflict", "a / b", "interference", "outvoted", "rank 5", "self.query"):
        assert word in text
    assert command("merge", a, b, "--explain", "--rule", "ties", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rule"] == "ties"
    assert found["overall"]["pairs"][0]["models"] == ["a", "b"]
    assert found["sites"][0]["ranks"] == {"a": 2, "b": 3}
    assert list(tmp_path.iterdir()) == []


def test_rules_lists_every_rule(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("rules", "--json") == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(found) == rule_names()
    assert found["ties"]["merges"] == "entries"
    assert found["ties"]["options"]["density"] == 0.2
    assert found["karcher"]["merges"] == "rotations"
    assert found["slerp"]["models"] == "2"
    assert found["fisher"]["needs"] == "fisher"
    assert found["dare"]["random"] is True
    assert found["compose"]["ordered"] is True
    assert command("rules") == 0
    text, _ = capsys.readouterr()
    assert all(name in text for name in rule_names())


def test_the_committed_page_of_rules_is_what_they_say(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("rules", "--write", tmp_path / "rules.md") == 0
    assert DOCS.read_text() == (tmp_path / "rules.md").read_text(), "run isotune rules --write docs/rules.md"
    assert command("rules", "ties") == 0
    text = capsys.readouterr().out
    assert "arXiv 2306.01708" in text
    assert "density" in text
    assert command("rules", "tie") == 2
    assert "Did you mean 'ties'?" in capsys.readouterr().err


def test_recover_gets_one_adapter_back(
    command: Command, a: Path, b: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = tmp_path / "both"
    assert command("merge", a, b, "--rule", "rmm", "--out", both) == 0
    text, _ = capsys.readouterr()
    assert "errors" in text
    assert command("recover", both, "b", "--out", tmp_path / "again", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": str(tmp_path / "again")}
    before, after = read_stored(b), read_stored(tmp_path / "again")
    assert before.settings.keys() == after.settings.keys()
    for path, state in before.state.items():
        one, other = (s["lora_B.weight"] @ s["lora_A.weight"] for s in (state, after.state[path]))
        assert one.allclose(other, atol=1e-6)
    assert command("recover", both, "c", "--out", tmp_path / "no") == 2
    assert "no model 'c'" in capsys.readouterr().err


def test_statistics_are_measured_and_used(
    command: Command, bert: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", bert, rows, tmp_path / "run", max_steps=2)
    run = train(build_recipe(recipe, sets=["method.name=lora", "head=random"]), progress=False).output
    other = tmp_path / "other"
    shutil.copytree(run / "adapter", other)
    assert command("merge", run, other, "--rule", "fisher", "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "2 problems" in err
    assert "isotune statistics" in err
    for folder in (run, other):
        assert (
            command("statistics", folder, "--fisher", "--data", rows / "train.jsonl", "--examples", 8, "--json") == 0
        )
        written = Path(json.loads(capsys.readouterr().out)["path"])
        assert written.is_file()
    assert written.parent == other
    assert command("merge", run, other, "--rule", "fisher", "--out", tmp_path / "out", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rule"] == "fisher"
    assert command("statistics", run) == 2
    assert "say what to measure: --fisher" in capsys.readouterr().err
    assert command("statistics", run, "--fisher", "--expectation", "mean") == 2
    assert "--expectation 'mean' is unknown; choose exact, sample or empirical" in capsys.readouterr().err


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no output": ([], "say where to write the result: --out FOLDER"),
    "no such folder": (["{a}", "{tmp}/none"], "there is no adapter folder"),
    "unknown rule": (["--rule", "tise"], "unknown rule 'tise'. Did you mean 'ties'?"),
    "unknown option": (["--rule", "ties", "--set", "denisty=1"], "ties has no option 'denisty'. Did you mean"),
    "option out of bounds": (["--rule", "ties", "--set", "density=2"], "ties: density=2 is not usable"),
    "option that is no number": (["--rule", "ties", "--set", "density=much"], "ties: density='much' is not usable"),
    "set without a value": (["--set", "density"], "--set takes option=value, not 'density'; for"),
    "set without an option": (["--set", "=0.3"], "--set takes option=value, not '=0.3'"),
    "too few weights": (["--weights", "1"], "--weights has 1 values for 2 models; give one each, in the same order"),
    "words as weights": (["--weights", "1,much"], "--weights takes numbers with commas between them, not 'much'"),
    "weights that are not finite": (["--weights", "1,nan"], "the weights 1, nan are not all finite numbers"),
    "too many names": (["--names", "x,y,z"], "--names has 3 values for 2 models"),
    "names that are the same": (["--names", "x,x"], "the names x, x are not all different"),
    "rank zero": (["--rank", "0"], "key 'rank': Input should be greater than or equal to 1"),
    "negative seed": (["--seed", "-1"], "key 'seed': Input should be greater than or equal to 0"),
    "one model twice": (["{a}", "{a}"], "is given twice; give it once, with twice the weight, or give names"),
    "three for slerp": (["{a}", "{b}", "{h1}", "--rule", "slerp"], "slerp merges exactly 2 models, and 3 were given"),
    "unknown modules": (["--modules", "mean"], "modules='mean' is unknown; say average, drop, or an adapter: a, b"),
    "a full model among adapters": (["{a}", "{bert}"], "is a full model, and no adapter; merge"),
    "no base": (["{a}", "{h1}", "--base", "{tmp}/none"], "{tmp}/none"),
    "search without runs": (["--search", "3"], "is no run's folder, whose validation rows could be used"),
    "resume": (["--resume"], "--resume goes on with a merge of full models"),
    "missing recipe": (["{tmp}/no.yaml"], "no recipe file at"),
    "weights beside a recipe": (["{recipe}", "--weights", "1,1"], "in a recipe each model has its own weight"),
    "misspelt key": (["{recipe}"], "unknown key 'models.1.wieght'. Did you mean 'weight'?"),
    "output that is an input": (["--out", "{a}"], "is one of the adapters to merge; the result needs another folder"),
    "output of somebody else's": (["--out", "{thesis}"], "the folder exists and holds something else"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gives_one_message_and_exit_code_2_and_writes_nothing(
    command: Command,
    folders: dict[str, Path],
    bert: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mistake: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    recipe = {"models": [str(folders["a"]), {"path": str(folders["b"]), "wieght": 1}]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = {
        **folders,
        "tmp": tmp_path,
        "bert": bert,
        "thesis": tmp_path / "thesis",
        "recipe": tmp_path / "recipe.yaml",
    }
    given, message = MISTAKES[mistake]
    arguments = [part.format(**places) for part in given]
    if not arguments or arguments[0].startswith("-"):
        arguments = [str(folders["a"]), str(folders["b"]), *arguments]
    if mistake != "no output" and "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    code = command("merge", *arguments)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert len([line for line in err.splitlines() if line.startswith("isotune: ")]) == 1
    assert message.format(**places) in err
    assert "Traceback" not in err
    assert out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_full_models_are_merged_with_a_base(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = [make_bert(tmp_path / name, 8, 8) for name in ("base", "one", "two")]
    out = tmp_path / "out"
    assert command("merge", *places[1:], "--base", places[0], "--rule", "linear", "--out", out, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == {"one": 1.0, "two": 1.0}
    AutoModel.from_pretrained(out)
    shutil.rmtree(out)
    assert command("merge", *places[1:], "--base", places[0], "--rule", "linear", "--out", out) == 0
    assert "linear" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["merge", "recover", "rules", "statistics"])
def test_help_is_there_and_teaches_by_examples(
    command: Command, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(name, "--help") == 0
    text, _ = capsys.readouterr()
    assert f"isotune {name}" in text
    if name == "merge":
        assert "Examples" in text
        assert "isotune merge runs/a runs/b runs/c --rule ties --weights 1,1,0.5" in text
