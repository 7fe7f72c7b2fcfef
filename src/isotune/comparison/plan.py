"""What a comparison consists of: a cell for each method at each budget, sized alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isotune.adapters.budget import nearest_to, total_parameters
from isotune.adapters.registry import method, method_class
from isotune.comparison.recipe import ComparisonRecipe, label, without_optimizer
from isotune.comparison.results import FROZEN, FULL
from isotune.errors import IsotuneError
from isotune.model.targets import find_targets
from isotune.sites import Site, require_site
from isotune.training.data import load_splits
from isotune.training.full import LEARNING_RATE
from isotune.training.optimizers import rate_factor
from isotune.training.results import trainable
from isotune.training.session import Session, TaskSpec

_FAR = 0.1
"""A size that misses its budget by more than this share is marked."""


@dataclass(frozen=True)
class Cell:
    """One row of the comparison: a method, sized for a budget."""

    label: str
    """The method's name and the options that were asked for."""
    method: dict[str, Any]
    """Its name and all its options, the size among them."""
    budget: int | None
    """Trainable parameters asked for; None for the rows that have none."""
    parameters: int
    """Trainable parameters beside the head."""
    rate: float | None
    """The learning rate around which it is tried; None for the frozen model."""

    @property
    def key(self) -> str:
        """Its name in files: letters, digits, dots, `-` and `_`."""
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in self.label)
        return plain if self.budget is None else f"{plain}-{self.budget}"

    @property
    def far(self) -> bool:
        """Whether its size misses the budget by more than a tenth."""
        return self.budget is not None and abs(self.parameters - self.budget) > _FAR * self.budget

    @property
    def options(self) -> dict[str, Any]:
        """The method's options without its name, and without its optimizer, which is in the label."""
        return {key: value for key, value in self.method.items() if key not in ("name", "optimizer")}


def make_plan(recipe: ComparisonRecipe) -> list[Cell]:
    """The cells of a comparison; reads the data and the model, and trains nothing.

    Raises IsotuneError where a method cannot adapt the target layers, or the data or the model cannot be used.
    """
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    session = Session(TaskSpec.of(recipe, splits.labels))
    model = session.model
    found = find_targets(model, recipe.targets, recipe.exclude, trained=[*session.head, *recipe.train_also])
    sites = {path: require_site(layer, path) for path, layer in found.items()}
    budgets = recipe.compare.budgets or [total_parameters(method("hra", rank=8), list(sites.values()))]
    cells = [_sized(options, budget, sites, recipe.optimizer) for budget in budgets for options in recipe.methods]
    if recipe.compare.full:
        trained, _ = trainable(model, session.head)
        rate = LEARNING_RATE * rate_factor(recipe.optimizer)
        cells.append(Cell(FULL, {"name": FULL}, None, trained, rate))
    if recipe.compare.frozen:
        cells.append(Cell(FROZEN, {"name": FROZEN}, None, 0, None))
    return cells


def _sized(
    options: dict[str, Any], budget: int, sites: dict[str, Site], optimizer: Mapping[str, Any] | None = None
) -> Cell:
    settings = nearest_to(budget, method(**without_optimizer(options)), list(sites.values()))
    for path, site in sites.items():
        if site.kind not in settings.kinds:
            raise IsotuneError(
                f"compare.methods: {label(options)} cannot adapt {path!r}, of kind {site.kind}; it can adapt: "
                f"{', '.join(sorted(settings.kinds))}"
            )
        try:
            settings.check(site)
        except IsotuneError as error:
            raise IsotuneError(f"compare.methods: {label(options)} does not fit {path!r}: {error}") from None
    sized = {"name": options["name"], **settings.model_dump(exclude_unset=True)}
    if "optimizer" in options:
        sized["optimizer"] = options["optimizer"]
    parameters = total_parameters(settings, list(sites.values()))
    rate = method_class(options["name"]).learning_rate * rate_factor(options.get("optimizer", optimizer))
    return Cell(label(options), sized, budget, parameters, rate)
