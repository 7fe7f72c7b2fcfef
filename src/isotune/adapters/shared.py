"""Tensors that the adapters on a model have in common: random matrices, as VeRA's, or factors that all train."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from isotune.sites import Site

_KNOWN = "isotune_shared"
"""Where the metadata of a state dict, while it is filled, names the shared tensors that it holds."""


class Shared(nn.Module):
    """The tensors by name, in one module that all these adapters hold.

    Moving, converting or copying a model therefore keeps one copy of them, which tensors of each adapter would not.
    What is frozen is no part of a state dict: `Settings.stores_shared` says whether it is saved with the adapter.
    What trains is in it once, at the first adapter, also where only some of the tensors are another module's, too.
    """

    def __init__(self, tensors: Mapping[str, Tensor], trained: bool = False) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if trained:
                self.register_parameter(name, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name. Raises KeyError where there is none."""
        tensor = self.tensors().get(name)
        if tensor is None:
            raise KeyError(f"missing {name}")
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return {**dict(self.named_buffers()), **dict(self.named_parameters())}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        known = getattr(destination, "_metadata", {}).setdefault(_KNOWN, set())
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.tensors().items():
            if id(tensor) in known:
                destination.pop(prefix + name, None)
            known.add(id(tensor))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        # What is missing stands at another adapter.
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], *args)


def largest(sites: Iterable[Site]) -> tuple[int, int]:
    """The largest in and the largest out of the sites, of which each takes its part."""
    ins, outs = zip(*((site.in_features, site.out_features) for site in sites), strict=True)
    return max(ins), max(outs)
