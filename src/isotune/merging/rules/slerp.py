"""Spherical interpolation between two changes, each weight flattened.

    ΔW = (sin((1 - t) Ω) ΔW_1 + sin(t Ω) ΔW_2) / sin Ω,    cos Ω = <ΔW_1, ΔW_2> / (|ΔW_1| |ΔW_2|)

Changes of the same length keep it, where their mean is shorter. Nearly parallel ones (|cos Ω| > 0.9995) are
interpolated linearly. Shoemake, "Animating rotation with quaternion curves" (SIGGRAPH 1985); on weights as mergekit
has it, but there of the whole weights, which are nearly parallel, here of the changes. Factored changes stay so: cos
Ω comes from inner products of the factors, at O((in + out) r²).
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar

from pydantic import Field

from isotune.errors import IsotuneWarning
from isotune.linalg.change import Change, product, size, total
from isotune.merging.contract import Aligned, Rule

_PARALLEL = 0.9995


class Slerp(Rule):
    """Spherical interpolation between the changes of two models."""

    name: ClassVar[str] = "slerp"
    symmetric: ClassVar[bool] = False
    models: ClassVar[tuple[int, int | None]] = (2, 2)

    t: float = Field(0.5, ge=0, le=1, description="Where between the models: 0 the first, 1 the second.")

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        (one, other), (v, w) = site.changes, site.weights
        lengths = abs(v * w) * size(one) * size(other)
        cosine = v * w * product(one, other) / lengths if lengths else 1.0
        first, second = 1 - self.t, self.t
        if abs(cosine) <= _PARALLEL:
            angle = math.acos(cosine)
            first, second = math.sin(first * angle) / math.sin(angle), math.sin(second * angle) / math.sin(angle)
        elif cosine < 0 and 0 < self.t < 1:
            warnings.warn(
                f"slerp: the two changes of {site.path} are opposite (cosine {cosine:.4f}), so that there is no one "
                "arc between them; they are interpolated linearly and largely cancel",
                IsotuneWarning,
                stacklevel=2,
            )
        return total(site.changes, (first * v, second * w))
