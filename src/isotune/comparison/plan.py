"""What a comparison consists of: a cell for each method at each budget, sized alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from isotune.adapters.budget import nearest_to, total_parameters
from isotune.adapters.registry import method, method_class
from isotune.adapters.settings import Settings
from isotune.comparison.recipe import BESIDE, ComparisonRecipe, label, own_options
from isotune.comparison.results import FROZEN, FULL
from isotune.errors import IsotuneError, TargetError
from isotune.model.attach import site_for
from isotune.model.targets import Targets, find_targets
from isotune.sites import Site
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
        """The method's options without its name, and without what is in the label."""
        return {key: value for key, value in self.method.items() if key not in ("name", *BESIDE)}


def make_plan(recipe: ComparisonRecipe) -> list[Cell]:
    """The cells of a comparison; reads the data and the model, and trains nothing.

    Raises IsotuneError where a method cannot adapt the target layers, or the data or the model cannot be used.
    """
    splits = load_splits(recipe.data, recipe.task, recipe.seed)
    session = Session(TaskSpec.of(recipe, splits.labels, splits.positive))
    model = session.model
    trained = [*session.head, *recipe.train_also]

    def sites(settings: Settings, targets: Targets | None) -> dict[str, Site]:
        targets = targets or recipe.targets or settings.usual_targets
        found = find_targets(model, targets, recipe.exclude, trained, settings.kinds)
        try:
            return {path: site_for(layer, path, settings) for path, layer in found.items()}
        except TargetError as error:
            raise TargetError(f"compare.methods: {error}") from None

    hra = method("hra", rank=8)
    budgets = recipe.compare.budgets or [total_parameters(hra, sites(hra, None))]
    methods = [(one, sites(method(**own_options(one)), one.get("targets"))) for one in recipe.methods]
    cells = [_sized(options, budget, on, recipe.optimizer) for budget in budgets for options, on in methods]
    if recipe.compare.full:
        whole, _ = trainable(model, session.head)
        rate = LEARNING_RATE * rate_factor(recipe.optimizer)
        cells.append(Cell(FULL, {"name": FULL}, None, whole, rate))
    if recipe.compare.frozen:
        cells.append(Cell(FROZEN, {"name": FROZEN}, None, 0, None))
    return cells


def _sized(
    options: dict[str, Any], budget: int, sites: dict[str, Site], optimizer: Mapping[str, Any] | None = None
) -> Cell:
    settings = nearest_to(budget, method(**own_options(options)), sites)
    for path, site in sites.items():
        try:
            settings.check(site)
        except IsotuneError as error:
            raise IsotuneError(f"compare.methods: {label(options)} does not fit {path!r}: {error}") from None
    sized = {"name": options["name"], **settings.model_dump(exclude_unset=True)}
    sized |= {key: options[key] for key in BESIDE if key in options}
    parameters = total_parameters(settings, sites)
    rate = method_class(options["name"]).learning_rate * rate_factor(options.get("optimizer", optimizer))
    return Cell(label(options), sized, budget, parameters, rate)
