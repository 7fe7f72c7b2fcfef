"""isotune: adapt pretrained PyTorch models with orthogonal and low-rank adapters."""

__version__ = "0.2.0"

from isotune.adapters.contract import Adapter, Branch, LowRank, Rotation, WeightAdapter
from isotune.adapters.low_rank.lora import LoRA
from isotune.adapters.mixed import Mixture
from isotune.adapters.orthogonal.hra import HRA
from isotune.adapters.peft.accelerate import accelerate_peft
from isotune.adapters.registry import method
from isotune.adapters.settings import Settings
from isotune.checkpoint.export import export_lora
from isotune.checkpoint.load import load, load_weights
from isotune.checkpoint.save import save
from isotune.errors import IsotuneError
from isotune.merging.adapters import merge
from isotune.model.attach import adapt, remove
from isotune.model.calibrate import calibrate
from isotune.model.catalogue import methods
from isotune.model.fold import fold, unfold
from isotune.model.switch import after_step, describe, disabled, parameter_groups, penalty, route, use

__all__ = [
    "HRA",
    "Adapter",
    "Branch",
    "IsotuneError",
    "LoRA",
    "LowRank",
    "Mixture",
    "Rotation",
    "Settings",
    "WeightAdapter",
    "accelerate_peft",
    "adapt",
    "after_step",
    "calibrate",
    "describe",
    "disabled",
    "export_lora",
    "fold",
    "load",
    "load_weights",
    "merge",
    "method",
    "methods",
    "parameter_groups",
    "penalty",
    "remove",
    "route",
    "save",
    "unfold",
    "use",
]
