"""The page of what servers wrote is what the figures say."""

from __future__ import annotations

import json

from benchmarks.serving import OPENING, PAGE, RESULTS, agreed, page


def test_tokens_count_until_the_first_that_differs() -> None:
    assert agreed([[1, 2, 3]], [[1, 2, 3]]) == 3
    assert agreed([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [9, 5, 6]]) == 1
    assert agreed([[1, 2, 3]], [[1, 2]]) == 2


def test_the_page_is_that_of_the_committed_figures() -> None:
    found = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(found)
    assert found["ours"].keys() == {"bare", "adapted"}
    assert "{" not in page(found)
    assert OPENING.splitlines()[0] == PAGE.read_text().splitlines()[0]


def test_a_lora_in_fp32_is_served_to_the_token() -> None:
    found = json.loads(RESULTS.read_text())
    count = {name: sum(map(len, answers)) for name, answers in found["ours"].items()}
    assert {"PEFT", "llama.cpp"} <= found["servers"].keys()
    for answers in found["servers"].values():
        assert agreed(answers["bare"], found["ours"]["bare"]) == count["bare"]
        assert agreed(answers["float32"], found["ours"]["adapted"]) == count["adapted"]
