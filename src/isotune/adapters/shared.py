"""Frozen tensors that the adapters on a model have in common, such as the random matrices of VeRA and RandLoRA."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from isotune.sites import Site


class Shared(nn.Module):
    """The tensors by name, in one module that all these adapters hold.

    Moving, converting or copying a model therefore keeps one copy of them, which buffers of each adapter would not.
    They are no part of a state dict: `Settings.stores_shared` says whether they are saved with the adapter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor, persistent=False)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name. Raises KeyError where there is none."""
        tensor = self._buffers.get(name)
        if tensor is None:
            raise KeyError(f"missing {name}")
        return tensor

    def tensors(self) -> dict[str, Tensor]:
        """All of them, by name."""
        return dict(self.named_buffers())


def largest(sites: Iterable[Site]) -> tuple[int, int]:
    """The largest in and the largest out of the sites, of which each takes its part."""
    ins, outs = zip(*((site.in_features, site.out_features) for site in sites), strict=True)
    return max(ins), max(outs)
