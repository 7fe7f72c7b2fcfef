"""Which rules of merging there are. A built-in rule is one line here; others register at `isotune.merging_rules`."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from isotune.errors import OptionError, nearest
from isotune.merging.contract import AnyRule, Rule

BUILT_IN = {
    "sum": "isotune.merging.rules.sum:Sum",
    "linear": "isotune.merging.rules.linear:Linear",
    "task_arithmetic": "isotune.merging.rules.task_arithmetic:TaskArithmetic",
    "slerp": "isotune.merging.rules.slerp:Slerp",
    "ties": "isotune.merging.rules.ties:TIES",
    "dare": "isotune.merging.rules.dare:DARE",
    "dare_ties": "isotune.merging.rules.dare_ties:DARETIES",
    "magnitude": "isotune.merging.rules.magnitude:Magnitude",
    "breadcrumbs": "isotune.merging.rules.breadcrumbs:Breadcrumbs",
    "della": "isotune.merging.rules.della:DELLA",
    "svd": "isotune.merging.rules.svd:Svd",
    "knots": "isotune.merging.rules.knots:KnOTS",
    "iso_c": "isotune.merging.rules.iso_c:IsoC",
    "iso_cts": "isotune.merging.rules.iso_cts:IsoCTS",
    "tsv_m": "isotune.merging.rules.tsv_m:TSVM",
    "opcm": "isotune.merging.rules.opcm:OPCM",
    "fisher": "isotune.merging.rules.fisher:Fisher",
    "ota": "isotune.merging.rules.ota:OTA",
    "ffg": "isotune.merging.rules.ffg:FFG",
    "compose": "isotune.merging.rules.compose:Compose",
    "karcher": "isotune.merging.rules.karcher:Karcher",
    "rmm": "isotune.merging.reversible.rmm:RMM",
    "symmetry": "isotune.merging.symmetry.skill:SkillTransfer",
}


def rule_names() -> list[str]:
    """The names of all rules, built-in ones first."""
    return [*BUILT_IN, *sorted(entry_points(group="isotune.merging_rules").names - BUILT_IN.keys())]


@cache
def rule_class(name: str) -> type[AnyRule]:
    """The class of a rule. Raises OptionError for an unknown name."""
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    if name not in (names := rule_names()):
        raise OptionError(f"unknown rule {name!r}.{nearest(name, names)} The rules are: {', '.join(names)}.")
    (entry,) = entry_points(group="isotune.merging_rules", name=name)
    return entry.load()


@dataclass(frozen=True)
class RuleRow:
    """What a rule says of itself."""

    name: str
    summary: str
    merges: str
    """changes, entries, rotations, adapters, or models."""
    models: str
    """How many it takes."""
    ordered: bool
    """Whether their order matters."""
    random: bool
    needs: str
    """A statistic that each model has to come with, or an empty text."""
    options: dict[str, Any]
    """The options and their defaults."""
    meanings: dict[str, str]
    """What the options mean."""
    about: str
    """The rule's equation, its paper and what it costs."""


def rules() -> list[RuleRow]:
    """All rules, in the order of the registry."""
    return [_row(rule_class(name)) for name in rule_names()]


def _row(found: type[AnyRule]) -> RuleRow:
    least, most = found.models
    own = found if issubclass(found, Rule) else None
    needs = (own.statistic or "").replace("_", " ") if own else ""
    return RuleRow(
        name=found.name,
        summary=(found.__doc__ or "").strip().splitlines()[0],
        merges="entries" if own and not own.exact_rank else found.takes,
        models=f"{least} or more" if most is None else str(least) if most == least else f"{least} to {most}",
        ordered=not found.symmetric,
        random=found.random,
        needs=needs,
        options={name: field.get_default() for name, field in found.model_fields.items()},
        meanings={name: field.description or "" for name, field in found.model_fields.items()},
        about=inspect.cleandoc(sys.modules[found.__module__].__doc__ or ""),
    )


def rule(name: str, **options: Any) -> AnyRule:
    """A rule by name, with its options. Raises OptionError for an unknown name or an option that cannot be used."""
    return rule_class(name)(**options)
