"""What a diagnosis says: plain values, which become JSON as they are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from isotune.diagnostics.overlap import Overlap
from isotune.diagnostics.variation import Variation


@dataclass(frozen=True)
class DiagnosisSettings:
    """What was asked."""

    k: int
    """How many leading singular triplets are looked at."""
    threshold: float
    """Below this cosine a singular vector is an intruder."""
    side: str
    """Whose singular vectors: left, right or both."""


@dataclass(frozen=True)
class SiteDiagnosis:
    """One weight (out, in). What cannot be known without the base is None."""

    site: str
    kind: str
    method: str
    out_features: int
    in_features: int
    trainable: int
    orthogonality_error: float | None
    """`|v R Rᵀ - v| / |v|` over random rows v for a rotation R; None for what is no rotation."""
    change_norm: float | None
    """`|W' - W| / |W|`, Frobenius."""
    change_rank: int | None
    """Numerical rank of W' - W."""
    share: float | None
    """The part of the squared change of all weights that is here."""
    effective_rank: float | None
    """How many directions carry the change: `exp` of the entropy of its singular values."""
    change_values: list[float] | None
    """The largest singular values of W' - W, at most 64."""
    weight_values: list[float] | None
    """The k largest singular values of W."""
    adapted_values: list[float] | None
    """The k largest singular values of W'."""
    similarity: list[float] | None
    """For the k leading singular vectors of W' the largest cosine with a singular vector of W."""
    window_similarity: list[float] | None
    """The same with the span of all vectors of W whose singular values are within 5 %."""
    intruders: list[int] | None
    """The vectors whose similarity is below the threshold, counted from 1."""
    intruder_share: float | None
    """The part of the squared change that lies along the intruders."""
    variation: Variation | None
    angles: list[float] | None
    """Of a rotation, the angles by which it turns, in radians, without those that are zero."""


@dataclass(frozen=True)
class Total:
    """All weights together."""

    sites: int
    trainable: int
    relative_change: float | None
    """`|all changes| / |all weights|`, of the weights that are listed."""
    intruders: int | None
    sites_with_intruders: int | None


@dataclass(frozen=True)
class Diagnosis:
    """What an adaptation did to a model."""

    path: str
    kind: Literal["adapter", "checkpoint"]
    method: str
    base_model: str | None
    settings: DiagnosisSettings
    total: Total
    sites: list[SiteDiagnosis]
    trained_modules: list[str]
    """Modules that an adapter trained in full, which are not measured."""
    left_out: dict[str, list[str]]
    """Tensors of a checkpoint that are not measured, by the reason."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Survey:
    """Several adaptations side by side."""

    diagnoses: list[Diagnosis]
    overlaps: list[Overlap]
    """Of each pair."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)
