"""Optimizers for adapters and for matrices: each steps what it is for, and the rest as AdamW does.

They take what torch's take: parameters or groups, a learning rate, a closure; they keep tensors alone in their state.
`isotune.parameter_groups(model, lr, algorithm="muon")` makes their groups from what a model's adapters say of their
parameters.
"""

from isotune.optim.adarem import AdaRem
from isotune.optim.ai_sarah import AISARAH
from isotune.optim.allora import ALLoRA
from isotune.optim.apts import APTS
from isotune.optim.auon import AuON, HybridAuON
from isotune.optim.conda import Conda
from isotune.optim.dct_adamw import DCTAdamW
from isotune.optim.matrix import adjustment
from isotune.optim.muon import Muon
from isotune.optim.names import OPTIMIZERS, optimizer_class
from isotune.optim.nog import OptimalRates, nearest_orthogonal_gradients
from isotune.optim.normuon import NorMuon
from isotune.optim.odelora import ODELoRA, rebalanced
from isotune.optim.orthogonalize import orthogonalize
from isotune.optim.scion import Scion, ScionLight
from isotune.optim.trion import Trion
from isotune.optim.width_rule import scaled_parameter_groups, top_singular_values

__all__ = [
    "AISARAH",
    "APTS",
    "OPTIMIZERS",
    "ALLoRA",
    "AdaRem",
    "AuON",
    "Conda",
    "DCTAdamW",
    "HybridAuON",
    "Muon",
    "NorMuon",
    "ODELoRA",
    "OptimalRates",
    "Scion",
    "ScionLight",
    "Trion",
    "adjustment",
    "nearest_orthogonal_gradients",
    "optimizer_class",
    "orthogonalize",
    "rebalanced",
    "scaled_parameter_groups",
    "top_singular_values",
]
