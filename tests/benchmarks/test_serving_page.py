"""The page of what servers wrote is what the figures say."""

from __future__ import annotations

import ast
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import OPENING, PAGE, RESULTS, compared, page, there

FOUND = json.loads(RESULTS.read_text())
CROWDED = "vLLM, one batch, no slot free"
SERVERS = {"PEFT", "llama.cpp", "vLLM", "vLLM, one batch", CROWDED}


def answers(*given: list[int], logprob: float = -1.0) -> list[dict[str, Any]]:
    return [{"tokens": tokens, "logprobs": [logprob] * len(tokens)} for tokens in given]


def test_tokens_count_until_the_first_that_differs() -> None:
    assert compared(answers([1, 2, 3]), answers([1, 2, 3])) == (3, 0.0)
    assert compared(answers([1, 2, 3], [4, 5, 6]), answers([1, 9, 3], [9, 5, 6]))[0] == 1
    assert compared(answers([1, 2, 3]), answers([1, 2]))[0] == 2


def test_log_probabilities_are_compared_where_the_tokens_are_the_same() -> None:
    assert compared(answers([1, 2], logprob=-1.0), answers([1, 2], logprob=-1.5)) == (2, 0.5)
    one, other = answers([1, 2, 3]), answers([1, 9, 3])
    other[0]["logprobs"][2] = -7.0
    assert compared(one, other) == (1, 0.0)


def test_the_page_is_that_of_the_committed_figures() -> None:
    assert PAGE.read_text() == page(FOUND)
    assert FOUND["ours"].keys() == {"bare", "sums", "products"}
    assert "{" not in page(FOUND)
    assert OPENING.splitlines()[0] == PAGE.read_text().splitlines()[0]


def test_a_lora_in_fp32_is_served_to_the_token() -> None:
    ours = FOUND["ours"]
    assert FOUND["servers"].keys() == SERVERS
    for server, found in FOUND["servers"].items():
        assert {"bare", "sums-float32", "products-float32"} <= found.keys()
        for name in ("bare", "sums-float32", "products-float32"):
            if (server, name) == (CROWDED, "bare"):
                continue
            wanted = ours[name.partition("-")[0]]
            assert [answer["tokens"] for answer in found[name]] == [answer["tokens"] for answer in wanted]
            assert compared(found[name], wanted)[1] < 1e-3


def test_vllm_on_a_cpu_gives_a_request_without_an_adapter_that_of_the_last_slot() -> None:
    """Its fault, which docs/serving.md warns of: drop the warning when new figures come without it."""
    bare = FOUND["servers"][CROWDED]["bare"]
    assert [answer["tokens"] for answer in bare] == [answer["tokens"] for answer in FOUND["ours"]["sums"]]
    assert "but all 51 of sums" in page(FOUND)
    assert "may be answered with one" in (PAGE.parent / "serving.md").read_text()


def test_the_adapters_are_told_apart_by_what_they_write() -> None:
    ours, written = FOUND["ours"], sum(len(answer["tokens"]) for answer in FOUND["ours"]["sums"])
    for one, other in (("bare", "sums"), ("bare", "products"), ("sums", "products")):
        assert compared(ours[one], ours[other])[0] < written // 2


def test_a_pipeline_of_diffusers_draws_what_isotune_draws() -> None:
    drawn = FOUND["diffusers"]
    assert drawn["differences"]["float32"] < 1e-5 * drawn["largest"]
    assert max(drawn["differences"].values()) < drawn["apart"] / 50


def test_a_server_that_is_not_installed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not there("vLLM", tmp_path)
    assert capsys.readouterr().out.startswith("vLLM was not asked: it is not installed in ")
    (tmp_path / ".installed").touch()
    assert there("vLLM", tmp_path)


def test_what_the_serving_scripts_import_of_isotune_is_there() -> None:
    """They import it within functions, so a name that moved would be missed only in a run."""
    taken = 0
    for file in Path(import_module("benchmarks").__path__[0]).glob("serving*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("isotune"):
                taken += len(node.names)
                assert all(hasattr(import_module(str(node.module)), alias.name) for alias in node.names)
    assert taken
