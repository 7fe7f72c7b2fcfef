"""The recipe of a comparison: that of a training run, with a section `compare` that says what is compared."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from isotune.adapters.registry import method
from isotune.comparison.results import FROZEN, FULL
from isotune.errors import IsotuneError, OptionError
from isotune.recipes import Section, checked, parse_yaml
from isotune.training.optimizers import checked_optimizer
from isotune.training.recipe import ForgettingSettings, Recipe
from isotune.training.tasks.names import metric_of

BESIDE = ("optimizer", "targets")
"""What a method that is compared may have of its own, and otherwise has as the recipe says."""
_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "b": 1_000_000_000}


class CompareSettings(Section):
    """What is compared, and how often each method is tried."""

    methods: list[dict[str, Any]] = Field(
        default=[],
        description="Names of methods, or sections {name: hra, side: out, optimizer: muon, targets: [query]}; by "
        "default the recipe's, and lora.",
    )
    budgets: list[int] = Field(
        default=[], description="Trainable parameters beside the head (40k, 1.5M); by default those of HRA of rank 8."
    )
    seeds: int = Field(default=3, ge=1, description="Seeds at each method's best learning rate.")
    trials: int = Field(default=8, ge=1, description="Learning rates tried for each method at each budget.")
    span: tuple[float, float] = Field(
        default=(0.1, 10.0), description="Learning rates tried, in multiples of each method's own default."
    )
    baseline: str = Field(
        default="",
        description="The method that others are set against, by name or, where it is there twice, with the options "
        "that tell it apart; by default lora.",
    )
    full: bool = Field(default=True, description="A row for full fine-tuning.")
    frozen: bool = Field(default=True, description="A row for the frozen model with a trained head.")
    cost_steps: int = Field(default=20, ge=0, description="Steps to time alone, when all runs are done; 0: none.")
    forgetting: ForgettingSettings | None = Field(
        default=None, description="Rows that show what a run forgot: another task's, or general text."
    )

    @field_validator("methods", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list):
            return value
        return [{"name": one.strip()} if isinstance(one, str) else one for one in names if one]

    @field_validator("methods")
    @classmethod
    def _known(cls, value: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for one in value:
            if not isinstance(one.get("name"), str):
                raise ValueError(f"{one} does not name a method; write hra, or {{name: hra, side: out}}")
            if one["name"] in (FULL, FROZEN):
                raise ValueError(f"{one['name']!r} is a row of its own: compare.{one['name']}: true or false")
            try:
                size = method(**own_options(one)).size_option
                checked_optimizer(one.get("optimizer"))
            except IsotuneError as error:
                raise ValueError(str(error)) from None
            if size in one:
                raise ValueError(f"{label(one)}: the budget decides {size}; leave it out")
        labels = [label(one) for one in value]
        if len(set(labels)) < len(labels):
            raise ValueError(f"the same method twice: {', '.join(labels)}")
        return value

    @field_validator("budgets", mode="before")
    @classmethod
    def _counted(cls, value: Any) -> Any:
        return [_count(one) for one in (value if isinstance(value, list) else [value])]

    @field_validator("span")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("two positive multiples, the smaller first, such as [0.1, 10]")
        return value


class ComparisonRecipe(Recipe):
    """A comparison. `output` is the folder of all its runs; `seed` is that of the trials, the next ones compare."""

    compare: CompareSettings = Field(default=CompareSettings(), description="What is compared.")

    @model_validator(mode="before")
    @classmethod
    def _metric_of_all(cls, raw: Any) -> Any:
        """`compare.metric` is the recipe's `metric`: what ranks the methods also judges each of their runs."""
        section = raw.get("compare") if isinstance(raw, dict) else None
        if not isinstance(section, dict) or "metric" not in section:
            return raw
        named, own = section["metric"], raw.get("metric")
        if own not in (None, named):
            raise ValueError(f"metric is {own!r}, and compare.metric is {named!r}; name it once")
        rest = {key: value for key, value in section.items() if key != "metric"}
        return {**raw, "metric": named, "compare": rest}

    @model_validator(mode="after")
    def _can_be_compared(self) -> ComparisonRecipe:
        if self.data.test is None:
            raise ValueError("data.test is needed: methods are compared on rows that chose nothing")
        if self.data.validation is None:
            raise ValueError("data.validation is needed: learning rates are chosen on validation rows")
        if self.overrides:
            raise ValueError("overrides belong to one method; give options in compare.methods")
        if self.save_second_moments:
            raise ValueError("save_second_moments belongs to isotune train")
        try:
            metric_of(self.task, self.metric)
        except OptionError as error:
            raise ValueError(f"metric: {error}") from None
        if self.compare.baseline and len(meant := self._called(self.compare.baseline)) != 1:
            what = f"is several of them: {', '.join(meant)}" if meant else (
                f"is none of the methods: {', '.join(label(one) for one in self.methods)}"
            )  # fmt: skip
            raise ValueError(f"compare.baseline {self.compare.baseline!r} {what}")
        return self

    def _called(self, name: str) -> list[str]:
        """The labels of the methods that a label, or a method's name alone, means."""
        names = {label(one): one["name"] for one in self.methods}
        return [name] if name in names else [own for own, method in names.items() if method == name]

    @property
    def methods(self) -> list[dict[str, Any]]:
        """The methods compared, each with its options."""
        return self.compare.methods or [self.method, *([{"name": "lora"}] if self.method["name"] != "lora" else [])]

    @property
    def baseline(self) -> str:
        """The label of the method that others are set against."""
        names = [label(one) for one in self.methods]
        if self.compare.baseline:
            return self._called(self.compare.baseline)[0]
        return "lora" if "lora" in names else names[0]

    def resolved(self) -> ComparisonRecipe:
        """The same comparison with absolute paths."""
        recipe = super().resolved()
        assert isinstance(recipe, ComparisonRecipe)
        held_out = self.compare.forgetting and self.compare.forgetting.resolved()
        return recipe.model_copy(update={"compare": self.compare.model_copy(update={"forgetting": held_out})})

    def run(
        self,
        method: Mapping[str, Any],
        rate: float | None,
        seed: int,
        output: Path,
        test: bool,
        steps: int | None = None,
    ) -> Recipe:
        """The recipe of one run; without `test` it does not see the test rows, `steps` limits it."""
        fields = {name: getattr(self, name) for name in Recipe.model_fields}
        if method["name"] == FULL:
            fields |= {name: Recipe.model_fields[name].default for name in ("targets", "exclude")}
        fields |= {key: method[key] for key in BESIDE if key in method}
        training = {key: value for key, value in self.training.items() if key != "learning_rate"}
        if rate is not None:
            training["learning_rate"] = rate
        if test and (along := self.compare.forgetting) and along.points:
            training = {"eval_strategy": "steps", "eval_steps": 1 / along.points, "eval_on_start": True} | training
        if steps is not None:
            training |= {"max_steps": steps, "save_strategy": "no", "eval_strategy": "no"}
        data = self.data if test else self.data.model_copy(update={"test": None})
        own = {"method": own_options(method), "training": training, "data": data}
        return Recipe(**fields | own | {"seed": seed, "output": str(output)})


def build_comparison(
    path: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> ComparisonRecipe:
    """A checked recipe of a comparison; see `isotune.recipes.checked`."""
    return checked(ComparisonRecipe, path, flags, sets)


def comparison_from(text: str) -> ComparisonRecipe:
    """A comparison from its resolved recipe's YAML."""
    return ComparisonRecipe.model_validate(parse_yaml(text))


def label(method: Mapping[str, Any]) -> str:
    """A method and the options given to it, in a few words: `hra side=out`."""
    return " ".join([method["name"], *(f"{key}={_short(value)}" for key, value in method.items() if key != "name")])


def _short(value: Any) -> str:
    """An optimizer with its options, in brackets."""
    return f"({label(value)})" if isinstance(value, dict) and "name" in value else str(value)


def own_options(method: Mapping[str, Any]) -> dict[str, Any]:
    """The method's own name and options, of one that is compared."""
    return {key: value for key, value in method.items() if key not in BESIDE}


def _count(value: Any) -> Any:
    """`40k` as 40000."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmb]?)\s*", value.lower())
    if not found:
        raise ValueError(f"{value!r} is no number of parameters; write 40000, 40k or 1.5M")
    return round(float(found[1]) * _UNITS[found[2]])
