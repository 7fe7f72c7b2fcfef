"""How many bytes a forward pass keeps for its backward pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(layer: nn.Module, call: Callable[[], Tensor]) -> dict[str, int]:
    """Bytes that `call`, a forward pass through `layer`, saves for backward: each storage once, and in full.

    "saved" is all of it; "saved_without_frozen" leaves out the parameters that are not trained.
    """
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # alive until the end, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    frozen = {p.untyped_storage().data_ptr() for p in layer.parameters() if not p.requires_grad}
    del result
    return {
        "saved": sum(storages.values()),
        "saved_without_frozen": sum(size for address, size in storages.items() if address not in frozen),
    }
