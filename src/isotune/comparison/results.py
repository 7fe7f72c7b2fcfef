"""What a comparison found, as summary.json holds it; the report, the command line and benchmarks read it here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from isotune.errors import IsotuneError
from isotune.intervals import Interval, paired

FULL, FROZEN = "full", "frozen"
"""Rows beside the methods: all of the model trained, and none of it (the head alone, where there is one)."""


Kind = Literal["trial", "seed", "cost"]
"""A learning rate tried, a seed at the best one, or a few steps timed alone."""


class _Stored(BaseModel):
    model_config = ConfigDict(extra="allow")


class EqualScore(_Stored):
    """What a row had forgotten where its validation score was one that all rows at its budget reach."""

    score: float
    """On the validation rows: of the rows at this budget the worst mean at the end."""
    steps: Interval
    """When it was reached."""
    forgetting: dict[str, Interval]
    beyond: int = 0
    """How many seeds were past the score at the first measurement, or never came to it; theirs is the nearest."""


class Row(_Stored):
    """A method at a budget: its scores on the test rows at its best learning rate, and what they cost."""

    method: str
    """The method's name and the options that were asked for."""
    budget: int | None = None
    options: dict[str, Any] = {}
    parameters: int | None = None
    """Trainable parameters beside the head."""
    learning_rate: float | None = None
    learning_rates: dict[str, float | None] = {}
    """The score on the validation rows at each rate that was tried (higher is better), None where it diverged."""
    edge: bool = False
    """Whether the best rate is the first or the last of those tried."""
    seeds: list[int] = []
    values: list[float]
    """The score of each seed."""
    test_rows: int | None = None
    """How many test rows the score is a share of, where it is one."""
    mean: float | None = None
    half_width: float | None = None
    difference: Interval | None = None
    """This row minus the baseline's at the same budget, paired over seeds."""
    front: bool = False
    """Whether no other row is as good with fewer parameters."""
    forgetting: dict[str, Interval] = {}
    forgetting_at: EqualScore | None = None
    """What was forgotten by the time of a score that all methods at the budget reach."""
    seconds_per_step: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: float | None = None
    adapter_bytes: int | None = None
    export_rank: int | None = None
    runs: list[str] = []
    """Folders of the seeds' runs within the comparison's."""
    failed: list[str] = []

    @model_validator(mode="after")
    def _complete(self) -> Row:
        """Older summaries lack what follows from the values."""
        if self.values and self.mean is None:
            own = Interval.of(self.values)
            self.mean, self.half_width = own.mean, own.half_width
        if len(self.seeds) != len(self.values):
            self.seeds = list(range(len(self.values)))
        return self

    @property
    def score(self) -> Interval:
        """The mean score with its interval; only for a row with values."""
        assert self.mean is not None
        return Interval(self.mean, self.half_width, self.values)

    @property
    def by_seed(self) -> dict[int, float]:
        """The score of each seed."""
        return dict(zip(self.seeds, self.values, strict=True))


class Line(_Stored):
    """A finished run of a comparison: a line of results.jsonl."""

    unit: str
    """Its name, and its folder's under runs/."""
    kind: Kind
    method: str
    budget: int | None = None
    options: dict[str, Any] = {}
    parameters: int | None = None
    learning_rate: float | None = None
    seed: int | None = None
    status: Literal["done", "failed"]
    error: str | None = None
    """Why it failed."""
    metrics: dict[str, Any] = {}
    """Numbers by name; None for what there is none of."""
    curve: list[dict[str, Any]] = []
    """What the trainer logged."""
    run: str | None = None
    """Its folder within the comparison's, where that was kept."""
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it did not fail."""
        return self.status == "done"


class Measure(_Stored):
    """Something that was measured of forgetting."""

    label: str
    base: float | None = None
    """What the base itself has."""
    higher_is_better: bool = True


class Units(_Stored):
    """How many runs there are."""

    planned: int = 0
    done: int = 0
    failed: int = 0


class Summary(_Stored):
    """What a comparison found; rows come best first."""

    task: str = ""
    model: str = ""
    targets: Any = None
    metric: str
    higher_is_better: bool = True
    baseline: str = ""
    confidence: str = "95 % t-interval over seeds"
    seeds: int = 0
    trials: int = 0
    """Learning rates tried for each method at each budget."""
    span: list[float] = []
    units: Units = Units()
    seconds: float = 0.0
    forgetting: dict[str, Measure] = {}
    rows: list[Row]
    without_result: list[str] = []
    """Methods that diverged at every learning rate."""
    environment: dict[str, Any] = {}

    @classmethod
    def read(cls, file: Path) -> Summary:
        """From a summary.json. Raises IsotuneError where it cannot be read, or is none."""
        try:
            return cls.model_validate(json.loads(file.read_text(encoding="utf-8")))
        except ValidationError as error:
            raise IsotuneError(f"{file} is no summary of a comparison: {_told(error)}; the file is damaged") from None
        except (OSError, ValueError) as error:
            raise IsotuneError(f"{file} cannot be read: {error}; the file is damaged or unfinished") from None

    @property
    def groups(self) -> list[Group]:
        """One for each budget, the smallest first; full fine-tuning and the frozen base are in none."""
        at: dict[int | None, list[Row]] = {}
        for row in self.rows:
            if row.values and row.method not in (FULL, FROZEN):
                at.setdefault(row.budget, []).append(row)
        order = sorted(at, key=lambda budget: (budget is None, budget or 0))
        return [Group(budget, ranked(at[budget], self.higher_is_better)) for budget in order]

    def reference(self, method: str) -> Row | None:
        """The row of full fine-tuning or of the frozen base, where it has results."""
        return next((row for row in self.rows if row.method == method and row.values), None)

    def lead(self, one: Row, other: Row) -> Interval | None:
        """How much better one row is than another; see `lead`."""
        return lead(one, other, self.higher_is_better)


@dataclass(frozen=True)
class Standing:
    """A row among others with its score, and how far the best of them lies ahead of it."""

    row: Row
    behind: Interval | None = None
    """The best minus this one, paired over seeds, positive where the best is better; None for the best itself."""

    @property
    def method(self) -> str:
        """The method's name."""
        return self.row.method

    @property
    def score(self) -> Interval:
        """The row's mean score with its interval."""
        return self.row.score

    @property
    def tied(self) -> bool:
        """Whether the paired interval holds zero."""
        return self.behind is None or self.behind.holds_zero


@dataclass(frozen=True)
class Group:
    """The methods at one budget, the best first."""

    budget: int | None
    standings: list[Standing] = field(default_factory=list)

    @property
    def best(self) -> Standing:
        """The highest mean."""
        return self.standings[0]

    @property
    def tied(self) -> list[Standing]:
        """The others that cannot be told apart from the best."""
        return [standing for standing in self.standings[1:] if standing.tied]

    @property
    def beaten(self) -> list[Standing]:
        """The others that are clearly behind the best."""
        return [standing for standing in self.standings[1:] if not standing.tied]


def ranked(rows: Sequence[Row], higher_is_better: bool) -> list[Standing]:
    """The rows that have a result, the best first, each with its distance to the best."""
    sign = -1 if higher_is_better else 1
    order = sorted((row for row in rows if row.values), key=lambda row: sign * row.score.mean)
    return [Standing(row, None if row is order[0] else lead(order[0], row, higher_is_better)) for row in order]


def lead(one: Row, other: Row, higher_is_better: bool) -> Interval | None:
    """How much better one row is than another, paired over seeds; positive is better, None without a common seed."""
    ours, theirs = one.by_seed, other.by_seed
    if other.method == FROZEN and len(theirs) == 1:  # the same for every seed: nothing in it is drawn
        theirs = dict.fromkeys(ours, *theirs.values())
    found = paired(ours, theirs, one.test_rows)
    return found if found is None or higher_is_better else -found


def _told(error: ValidationError) -> str:
    """The first thing that is wrong: `row 2 has no values`."""
    first = error.errors()[0]
    place = [f"row {part + 1}" if isinstance(part, int) else str(part) for part in first["loc"] if part != "rows"]
    if first["type"] == "missing":
        where, name = place[:-1] or ["it"], place[-1] if place else "rows"
        return f"{' '.join(where)} has no {name}"
    return f"{' '.join(place) or 'rows'}: {first['msg'].lower()}"
