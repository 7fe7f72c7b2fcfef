"""What a comparison's recipe says, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from isotune.comparison.recipe import build_comparison, comparison_from
from isotune.errors import IsotuneError
from isotune.training.recipe import Recipe

FLAGS = {"model": "minilm", "data.train": "train.csv", "data.test": "test.csv", "output": "out"}


def build(**more: Any) -> Any:
    return build_comparison(flags=FLAGS | {key.replace("__", "."): value for key, value in more.items()})


def test_methods_are_names_or_sections_and_budgets_short() -> None:
    found = build(compare__methods=["hra", {"name": "lora", "alpha": 8}], compare__budgets=["40k", "1.5M", 123])
    assert found.methods == [{"name": "hra"}, {"name": "lora", "alpha": 8}]
    assert found.compare.budgets == [40_000, 1_500_000, 123]
    assert build(compare__methods="hra, lora").methods == [{"name": "hra"}, {"name": "lora"}]


def test_by_default_the_recipes_method_is_set_against_lora() -> None:
    found = build(method={"name": "oft"})
    assert [one["name"] for one in found.methods] == ["oft", "lora"]
    assert found.baseline == "lora"
    assert build(compare__methods="hra,oft").baseline == "hra"
    one_side = [{"name": "hra", "side": "out"}, "lora"]
    assert build(compare__methods=one_side, compare__baseline="hra").baseline == "hra side=out"


def test_the_metric_may_stand_in_the_section_and_judges_the_runs_too() -> None:
    found = build(compare__metric="matthews")
    assert found.metric == build(metric="matthews").metric == "matthews"
    assert found == build(compare__metric="matthews", metric="matthews")
    assert found.run({"name": "hra"}, 1e-3, 2, Path("x"), test=True).metric == "matthews"


def test_a_resolved_comparison_is_read_back_the_same() -> None:
    found = build(compare__methods="hra,lora", compare__budgets="40k").resolved()
    assert comparison_from(found.to_yaml()) == found


def test_a_run_is_a_recipe_of_its_own_and_a_trial_never_sees_the_test_rows() -> None:
    found = build(training__learning_rate=1.0, training__max_steps=7)
    trial = found.run({"name": "hra", "rank": 4}, 1e-3, 2, Path("out/runs/x"), test=False)
    assert type(trial) is Recipe
    assert (trial.data.test, trial.seed, trial.output) == (None, 2, "out/runs/x")
    assert trial.training == {"max_steps": 7, "learning_rate": 1e-3}
    assert found.run({"name": "hra"}, 1e-3, 2, Path("x"), test=True).data.test == "test.csv"
    assert (
        found.run({"name": "full"}, 1e-3, 2, Path("x"), test=True).targets == Recipe.model_fields["targets"].default
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compare__methods": "hra,lorra"}, "unknown method 'lorra'"),
        ({"compare__methods": [{"name": "hra", "rnk": 2}]}, "rnk"),
        ({"compare__methods": [{"rank": 2}]}, "does not name a method"),
        ({"compare__methods": "hra,hra"}, "the same method twice"),
        ({"compare__methods": [{"name": "oft", "block": 8}]}, "the budget decides block"),
        ({"compare__methods": "hra,full"}, "a row of its own"),
        ({"compare__budgets": "many"}, "'many' is no number of parameters"),
        ({"compare__span": [10, 0.1]}, "the smaller first"),
        ({"compare__baseline": "oft"}, "none of the methods: hra, lora"),
        (
            {
                "compare__methods": [{"name": "hra", "side": side} for side in ("in", "out")],
                "compare__baseline": "hra",
            },
            "'hra' is several of them: hra side=in, hra side=out",
        ),
        ({"compare__trials": 0}, "compare.trials"),
        ({"metric": "acuracy"}, "no metric 'acuracy'. Did you mean 'accuracy'?"),
        ({"compare__metric": "f2"}, "no metric 'f2'"),
        ({"metric": "f1", "compare__metric": "loss"}, "metric is 'f1', and compare.metric is 'loss'; name it once"),
        ({"compare__tirals": 3}, "trials"),
        ({"data__test": None, "data__validation": 0.2}, "data.test is needed"),
        ({"overrides": {"query": {"rank": 2}}}, "overrides belong to one method"),
    ],
)
def test_mistakes_are_named(change: dict[str, Any], message: str) -> None:
    flags = {key: value for key, value in FLAGS.items() if change.get(key.replace(".", "__"), "") is not None}
    changed = {key.replace("__", "."): value for key, value in change.items() if value is not None}
    with pytest.raises(IsotuneError, match=message.replace("(", r"\(")):
        build_comparison(flags=flags | changed)


def test_without_validation_rows_nothing_could_be_chosen() -> None:
    with pytest.raises(IsotuneError, match="learning rates are chosen on validation rows"):
        build_comparison(flags=FLAGS, sets=["data.validation=null"])
