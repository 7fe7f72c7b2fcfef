"""What an adaptation did to the weights of a model. One file a measure.

    from isotune.diagnostics import diagnose, mitigate

The names are loaded on first use.
"""

from __future__ import annotations

from isotune.lazy import lazy

_HOMES = {
    "Diagnosis": "diagnosis",
    "SiteDiagnosis": "diagnosis",
    "Survey": "diagnosis",
    "diagnose": "all_measures",
    "survey": "all_measures",
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
    "IntrinsicDimension": "intrinsic",
    "intrinsic_dimension": "intrinsic",
}

__all__ = [
    "AttentionBound",
    "Diagnosis",
    "IntrinsicDimension",
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
    "intrinsic_dimension",
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

__getattr__ = lazy(__name__, _HOMES)
