"""A skill from one model of a family to another, aligned by the symmetries of their parameters.

    θ = θ_target + scale · (π(θ_skilled) - π(θ_base))

π permutes neurons and heads, and rotates and scales inside heads, so that the base computes what it did before and
lies as near to the target as it can. `isotune.merging.symmetry.transfer` has it for Python, also for adapters. Paper:
"Leveraging Parameter Space Symmetries for Reasoning Skill Transfer in LLMs", 2025, arXiv 2511.10850.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from isotune.merging.contract import Job
from isotune.merging.record import MovedSkill
from isotune.merging.symmetry.transfer import transfer


class SkillTransfer(Job):
    """Target + scale · π(skilled - base): the models are the target and the skilled one, --base the skilled one's."""

    name: ClassVar[str] = "symmetry"
    takes = "models"
    symmetric: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (2, 2)
    unweighted = "weights have no meaning for rule symmetry; --set scale=0.5 says how much of the skill is added"
    needs_base = "the model that the second one, the skilled, started from"

    scale: float = Field(1.0, allow_inf_nan=False, description="Factor on what is added; 0.3 to 1 are usual.")
    use: tuple[Literal["permutation", "value_output", "query_key", "scale"], ...] | None = Field(
        None, description="The symmetries to use; none of them, [], is plain task arithmetic."
    )
    reference: Literal["base", "skilled"] = Field("base", description="Which of the two source models is aligned.")

    def run(
        self, models: Sequence[Path], output: Path, names: Sequence[str] | None, base: str | None, progress: bool
    ) -> MovedSkill:
        target, skilled = models
        assert base is not None
        return transfer(target, base, skilled, output, **self.model_dump())
