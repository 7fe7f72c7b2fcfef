"""What an adaptation did to the weights of a model. One file a measure.

    from isotune.diagnostics import diagnose, mitigate

The names are loaded on first use, so that importing this package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Diagnosis": "diagnosis",
    "SiteDiagnosis": "diagnosis",
    "Survey": "diagnosis",
    "diagnose": "walk",
    "survey": "walk",
    "Spectra": "decompositions",
    "spectra": "decompositions",
    "Intruders": "intruders",
    "intruder_dimensions": "intruders",
    "intruder_counts": "intruders",
    "Mitigated": "mitigation",
    "mitigate": "mitigation",
    "Variation": "variation",
    "spectral_variation": "variation",
    "effective_rank": "sizes",
    "orthogonality_error": "rotations",
    "rotation_angles": "rotations",
    "Overlap": "overlap",
    "subspace_overlap": "overlap",
    "AttentionBound": "norm_bound",
    "attention_bounds": "norm_bound",
    "scale_to_bound": "norm_bound",
    "attention_norms": "measured_norms",
}

__all__ = [
    "AttentionBound",
    "Diagnosis",
    "Intruders",
    "Mitigated",
    "Overlap",
    "SiteDiagnosis",
    "Spectra",
    "Survey",
    "Variation",
    "attention_bounds",
    "attention_norms",
    "diagnose",
    "effective_rank",
    "intruder_counts",
    "intruder_dimensions",
    "mitigate",
    "orthogonality_error",
    "rotation_angles",
    "scale_to_bound",
    "spectra",
    "spectral_variation",
    "subspace_overlap",
    "survey",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"isotune.diagnostics.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
