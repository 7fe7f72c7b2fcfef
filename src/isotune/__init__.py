"""isotune: adapt pretrained PyTorch models with orthogonal and low-rank adapters."""

from typing import TYPE_CHECKING

from isotune.lazy import lazy
from isotune.version import __version__ as __version__

if TYPE_CHECKING:
    from isotune.adapters.contract import Adapter as Adapter
    from isotune.adapters.contract import Branch as Branch
    from isotune.adapters.contract import LowRank as LowRank
    from isotune.adapters.contract import Rotation as Rotation
    from isotune.adapters.contract import WeightAdapter as WeightAdapter
    from isotune.adapters.low_rank.lora import LoRA as LoRA
    from isotune.adapters.mixed import Mixture as Mixture
    from isotune.adapters.orthogonal.hra import HRA as HRA
    from isotune.adapters.peft.accelerate import accelerate_peft as accelerate_peft
    from isotune.adapters.registry import method as method
    from isotune.adapters.settings import Settings as Settings
    from isotune.checkpoint.export import export_lora as export_lora
    from isotune.checkpoint.load import load as load
    from isotune.checkpoint.load import load_weights as load_weights
    from isotune.checkpoint.save import save as save
    from isotune.errors import IsotuneError as IsotuneError
    from isotune.integrations.peft_view import as_peft as as_peft
    from isotune.kernels.choice import set_kernels as set_kernels
    from isotune.merging.adapters.merge import merge as merge
    from isotune.model.attach import adapt as adapt
    from isotune.model.attach import remove as remove
    from isotune.model.calibrate import calibrate as calibrate
    from isotune.model.catalogue import methods as methods
    from isotune.model.compact import compact as compact
    from isotune.model.fold import fold as fold
    from isotune.model.fold import unfold as unfold
    from isotune.model.gate import SequenceGate as SequenceGate
    from isotune.model.groups import parameter_groups as parameter_groups
    from isotune.model.slim import slim as slim
    from isotune.model.switch import after_step as after_step
    from isotune.model.switch import describe as describe
    from isotune.model.switch import disabled as disabled
    from isotune.model.switch import penalty as penalty
    from isotune.model.switch import route as route
    from isotune.model.switch import tokens as tokens
    from isotune.model.switch import use as use
    from isotune.model.tasks import add_task as add_task
    from isotune.model.tasks import use_task as use_task

_HOMES = {
    "Adapter": "adapters.contract",
    "Branch": "adapters.contract",
    "LowRank": "adapters.contract",
    "Rotation": "adapters.contract",
    "WeightAdapter": "adapters.contract",
    "LoRA": "adapters.low_rank.lora",
    "Mixture": "adapters.mixed",
    "HRA": "adapters.orthogonal.hra",
    "accelerate_peft": "adapters.peft.accelerate",
    "method": "adapters.registry",
    "Settings": "adapters.settings",
    "export_lora": "checkpoint.export",
    "load": "checkpoint.load",
    "load_weights": "checkpoint.load",
    "save": "checkpoint.save",
    "IsotuneError": "errors",
    "as_peft": "integrations.peft_view",
    "set_kernels": "kernels.choice",
    "merge": "merging.adapters.merge",
    "adapt": "model.attach",
    "remove": "model.attach",
    "calibrate": "model.calibrate",
    "compact": "model.compact",
    "methods": "model.catalogue",
    "fold": "model.fold",
    "unfold": "model.fold",
    "slim": "model.slim",
    "after_step": "model.switch",
    "SequenceGate": "model.gate",
    "describe": "model.switch",
    "disabled": "model.switch",
    "parameter_groups": "model.groups",
    "penalty": "model.switch",
    "route": "model.switch",
    "tokens": "model.switch",
    "use": "model.switch",
    "add_task": "model.tasks",
    "use_task": "model.tasks",
}

__all__ = [
    "HRA",
    "Adapter",
    "Branch",
    "IsotuneError",
    "LoRA",
    "LowRank",
    "Mixture",
    "Rotation",
    "SequenceGate",
    "Settings",
    "WeightAdapter",
    "accelerate_peft",
    "adapt",
    "add_task",
    "after_step",
    "as_peft",
    "calibrate",
    "compact",
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
    "slim",
    "tokens",
    "unfold",
    "use",
    "use_task",
]

__getattr__ = lazy(__name__, _HOMES)
