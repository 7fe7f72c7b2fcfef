"""Search the weights of a merge, in a bounded number of trials, by whatever score the caller measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isotune.errors import OptionError

FIRST = (1.0, 0.5, 0.3)
"""Equal weights that are tried before the search begins."""


@dataclass(frozen=True)
class Searched:
    """What a search found."""

    weights: list[float]
    score: float
    trials: list[dict[str, Any]]
    """Every trial's weights and score, in order."""


def search_weights(
    score: Callable[[list[float]], float],
    start: Sequence[float],
    trials: int,
    seed: int = 0,
    bounds: tuple[float, float] = (0.0, 1.5),
) -> Searched:
    """The weights of the highest score, by Optuna's tree-structured Parzen estimator.

    The first trials are `start`, as given, and equal weights; the score is therefore never below that of `start`.

    Args:
        score: Called once a trial with one weight for each model; higher is better.
        start: The weights to begin with.
        trials: How many, at most.
        seed: Seed of the sampler.
        bounds: Smallest and largest weight that the sampler tries.

    Raises:
        OptionError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise OptionError("the search needs Optuna: pip install 'isotune[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found: list[dict[str, Any]] = []

    def tried(weights: list[float]) -> float:
        known = next((trial["score"] for trial in found if trial["weights"] == weights), None)
        value = score(weights) if known is None else known
        found.append({"weights": weights, "score": value})
        return float(value)

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    equal = [[one] * len(start) for one in FIRST]
    first = [list(start), *(weights for weights in equal if weights != list(start))][:trials]
    # The sampler learns from them, but they need not lie within its bounds.
    spread: dict[str, Any] = {f"w{i}": optuna.distributions.FloatDistribution(*bounds) for i in range(len(start))}
    for weights in first:
        value = tried(weights)
        if all(bounds[0] <= weight <= bounds[1] for weight in weights):
            params = dict(zip(spread, weights, strict=True))
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spread, value=value))
    if trials > len(first):
        study.optimize(
            lambda trial: tried([trial.suggest_float(name, *bounds) for name in spread]), n_trials=trials - len(first)
        )
    best = max(found, key=lambda trial: trial["score"])
    return Searched(best["weights"], best["score"], found)
