"""The optimizers by their names, for recipes and parameter groups; each is imported where it is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from isotune.errors import OptionError, nearest

OPTIMIZERS = {
    "adarem": "AdaRem",
    "allora": "ALLoRA",
    "auon": "AuON",
    "conda": "Conda",
    "dct_adamw": "DCTAdamW",
    "hybrid_auon": "HybridAuON",
    "muon": "Muon",
    "normuon": "NorMuon",
    "odelora": "ODELoRA",
    "scion": "Scion",
    "scion_light": "ScionLight",
    "trion": "Trion",
}
"""Classes of `isotune.optim`, by the names that a group's `algorithm` has."""
OF_LOOPS = {
    "ai_sarah": "AISARAH",
    "apts": "APTS",
    "nog": "nearest_orthogonal_gradients",
    "olr": "OptimalRates",
    "width_rule": "scaled_parameter_groups",
}
"""What else there is in `isotune.optim`, for loops of one's own."""


def optimizer_class(name: str) -> Any:
    """The class of that name. Raises OptionError where there is none."""
    if name not in OPTIMIZERS:
        raise OptionError(
            f"optimizer {name!r} is unknown.{nearest(name, OPTIMIZERS)} isotune's are: {', '.join(OPTIMIZERS)}"
        )
    return getattr(import_module("isotune.optim"), OPTIMIZERS[name])
