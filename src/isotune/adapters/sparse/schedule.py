"""When a structured pruning adapter leaves out parts of its layer.

left(t) = keep + (1 - keep) (1 - t)³,   t = (progress - start) / (end - start), within 0 and 1
"""

from __future__ import annotations

from pydantic import Field

from isotune.adapters.settings import Settings
from isotune.errors import OptionError


class StructuredPruning(Settings):
    """When parts of a layer are left out, and by what."""

    keep: float = Field(0.5, gt=0, le=1, description="Share of the channels, or blocks, to be left.")
    start: float = Field(0.1, ge=0, lt=1, description="Share of the training before anything is left out.")
    end: float = Field(0.6, gt=0, le=1, description="Share of the training after which no more is left out.")
    p: float = Field(2.0, ge=1, le=4, description="The norm that says what is worth most.")

    def model_post_init(self, _: object) -> None:
        if self.start >= self.end:
            raise OptionError(f"{self.name}: start={self.start} must be before end={self.end}")

    def left(self, progress: float, total: int) -> int:
        """How many of these are left when this share of the training is done; always one at least."""
        done = min(max((progress - self.start) / (self.end - self.start), 0.0), 1.0)
        return max(1, round((self.keep + (1 - self.keep) * (1 - done) ** 3) * total))
