"""A recipe of merging: which models, by which rule, to where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from isotune.merging.contract import AnyRule
from isotune.merging.registry import rule
from isotune.recipes import Section, checked


class Input(Section):
    """One of the models to merge."""

    path: str = Field(description="Folder of an adapter, a run, or a full model.")
    weight: float = Field(default=1.0, description="Its weight.")
    name: str | None = Field(default=None, description="Its name; by default the folder's.")


class MergeRecipe(Section):
    """Many models into one."""

    models: list[Input] = Field(min_length=1, description="The models: folders, or path, weight and name of each.")
    rule: dict[str, Any] = Field(default={"name": "sum"}, description="The rule's name and its options.")
    output: str | None = Field(default=None, description="Folder to write.")
    rank: int | None = Field(default=None, ge=1, description="Largest rank of the merged adapter.")
    base: str | None = Field(default=None, description="The base model, where it is needed and not found.")
    modules: str | None = Field(
        default=None, description="Modules trained in full: average, drop, or the model whose modules to keep."
    )
    vocabulary: Literal["error", "intersect"] = Field(
        default="error", description="Full models whose vocabularies differ: error, or intersect for common rows."
    )
    seed: int = Field(default=0, ge=0, description="Seeds the rules that draw.")

    @field_validator("models", mode="before")
    @classmethod
    def _paths(cls, value: Any) -> Any:
        return [{"path": one} if isinstance(one, str) else one for one in value] if isinstance(value, list) else value

    @field_validator("rule", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "sum", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _names(self) -> MergeRecipe:
        given = [model.name for model in self.models if model.name]
        if given and len(given) < len(self.models):
            raise ValueError("give every model a name, or none of them")
        return self

    @property
    def paths(self) -> list[str]:
        """The models' folders."""
        return [model.path for model in self.models]

    @property
    def weights(self) -> list[float]:
        """The models' weights."""
        return [model.weight for model in self.models]

    @property
    def names(self) -> list[str] | None:
        """The models' names, where they are given."""
        names = [model.name for model in self.models if model.name]
        return names or None

    def built_rule(self) -> AnyRule:
        """The rule with its options. Raises OptionError where they cannot be used."""
        return rule(**self.rule)


def build_merge_recipe(
    path: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> MergeRecipe:
    """A checked recipe of merging; see `isotune.recipes.checked`."""
    return checked(MergeRecipe, path, flags, sets)
