"""Learning rates to try: first an even grid over the span, then where the results point (Optuna's TPE).

Which rates are tried follows from the results so far alone, so that an interrupted comparison goes on as it would
have, on any number of workers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

from isotune.comparison.plan import Cell
from isotune.errors import OptionError

try:
    import optuna
except ImportError:
    raise OptionError("isotune compare needs Optuna: pip install 'isotune[search]'") from None

Scores = Mapping[float, float | None]
"""For each rate tried its score (higher is better), None where the run diverged."""


def tried(cell: Cell, span: tuple[float, float], trials: int, scores: Scores) -> tuple[list[float], list[float]]:
    """The rates that belong to this search, in order, as far as the scores decide them; and those yet to be run.

    Args:
        cell: The method, and the rate that the span is about.
        span: The least and the largest rate, in multiples of that one.
        trials: How many rates in all; two thirds of them on the grid, the next one the method's own.
        scores: What is known.
    """
    assert cell.rate is not None
    low, high = (cell.rate * multiple for multiple in span)
    rates = _with(cell.rate, _grid(low, high, trials - trials // 3), trials)
    missing = [rate for rate in rates if rate not in scores]
    while not missing and len(rates) < trials:
        rates.append(_suggested(low, high, tuple((rate, scores[rate]) for rate in rates)))
        missing = [rate for rate in rates[-1:] if rate not in scores]
    return rates, missing


def _grid(low: float, high: float, count: int) -> list[float]:
    if count == 1 or low == high:
        return [_rounded(math.sqrt(low * high))]
    return [_rounded(low * (high / low) ** (index / (count - 1))) for index in range(count)]


def _with(default: float, rates: list[float], trials: int) -> list[float]:
    """The method's own rate among them, which users try first; where all are on the grid, in the nearest's place."""
    default = _rounded(default)
    if default in rates or not rates[0] <= default <= rates[-1]:
        return rates
    if len(rates) < trials:
        return [*rates, default]
    nearest = min(rates, key=lambda rate: abs(math.log(rate / default)))
    return [default if rate == nearest else rate for rate in rates]


@functools.lru_cache(maxsize=4096)
def _suggested(low: float, high: float, known: tuple[tuple[float, float | None], ...]) -> float:
    """A rate for the results so far; the same for the same results."""
    worst = min((score for _, score in known if score is not None), default=0.0)
    spread = optuna.distributions.FloatDistribution(low, high, log=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(n_startup_trials=0, seed=len(known))
    )
    for rate, score in known:
        study.add_trial(
            optuna.trial.create_trial(
                params={"rate": min(max(rate, low), high)},
                distributions={"rate": spread},
                value=worst if score is None else score,  # a rate that diverged is as bad as the worst
            )
        )
    rate = _rounded(study.ask({"rate": spread}).params["rate"])
    while rate in dict(known):  # a trial is not spent twice on the same
        rate = _rounded(rate * 1.05)
    return rate


def _rounded(rate: float) -> float:
    """Three digits, which name the run's folder."""
    return float(f"{rate:.3g}")
