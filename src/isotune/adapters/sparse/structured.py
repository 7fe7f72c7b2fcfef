"""What SPLoRA and SPPaRA share: channels of the layer are left out during training, and for good.

    W' = diag(m_out) (W + D) diag(m_in),   b' = m_out ∘ (b + β),   m_out, m_in in {0, 1}

D (out x in) is the adapter's change; on a convolution it is at the centre of the kernel, and m_in covers all taps.
A channel is worth the p-norm of the rows of the adapted weight that make it, and a layer keeps those that are worth
most: all at first, then fewer along a cubic, from the share `start` of the training to the share `end`, and at last
the share `keep`. Layers that read these channels leave out their columns, so that the channels have no effect, even
where something after a pruned row, such as a batch norm, gives it a value again. `sparse/channels.py` finds which
layers make channels and which read them; a layer in no group keeps all that it has, unless `outputs` names one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from isotune.adapters.contract import WeightAdapter, check_tensors
from isotune.adapters.settings import Settings
from isotune.adapters.sparse.channels import channel_groups, channels
from isotune.adapters.sparse.schedule import StructuredPruning
from isotune.errors import IsotuneError, OptionError
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.sparse import largest_of_all, packed_bits, unpacked_bits
from isotune.sites import CONVOLUTIONS, LINEAR, Site

Cut = tuple[Literal["out", "in"] | None, ...]


class ChannelPruning(StructuredPruning):
    """Of which channels a layer has a part."""

    kinds: ClassVar[frozenset[str]] = LINEAR | CONVOLUTIONS

    head_size: int | None = Field(None, gt=0, description="Size of an attention head, to prune heads as well.")
    outputs: str = Field("", description="Name of the channels that it makes; found where it is not given.")
    inputs: str = Field("", description="Name of the channels that it reads; found where it is not given.")
    heads: int = Field(0, ge=0, description="Heads that these channels are; 0 where each stands for itself.")

    def allot(self, sites: Mapping[str, Site]) -> dict[str, Settings]:
        chosen: dict[str, Settings] = dict.fromkeys(sites, self)
        for group in channel_groups(sites, self.head_size) if self.keep < 1 else []:
            for side, paths in (("outputs", group.makers), ("inputs", group.readers)):
                for path in paths:
                    chosen[path] = chosen[path].model_copy(update={side: group.name, "heads": group.heads})
        return chosen

    def check(self, site: Site) -> None:
        if site.kind in CONVOLUTIONS and any(k % 2 == 0 for k in site.layer.kernel_size):
            raise OptionError(
                f"the kernel {tuple(site.layer.kernel_size)} has no centre, where {self.name} adds its change; name "
                "layers with kernels of odd sizes"
            )
        if self.inputs and site.kind in CONVOLUTIONS and site.layer.groups > 1:
            raise OptionError("the groups of a grouped convolution read different channels; it cannot leave any out")
        sides = (self.outputs, site.out_features), (self.inputs, channels(site))
        if any(name and self.heads and size % self.heads for name, size in sides):
            raise OptionError(f"heads={self.heads} does not divide the channels of the layer evenly")


class ChannelMasked(WeightAdapter):
    """Holds β (out), where the layer has a bias, and which outputs (out) and channels that it reads (in) are left."""

    cuts: ClassVar[Mapping[str, Cut]]
    """Of every parameter by name, which of its dimensions are outputs, and which are channels that it reads."""
    kept_out: Tensor | None
    kept_in: Tensor | None

    def __init__(self, site: Site, settings: ChannelPruning) -> None:
        super().__init__()
        n_out, n_in = site.out_features, channels(site)
        self.settings, self.taps = settings, site.in_features // n_in
        self.beta = None if site.bias is None else nn.Parameter(torch.zeros(n_out))
        for side, name, size in (("out", settings.outputs, n_out), ("in", settings.inputs, n_in)):
            self.register_buffer(f"kept_{side}", torch.ones(size, dtype=torch.bool) if name else None)

    @property
    def leaves_out(self) -> bool:
        """Whether it may leave out channels, of those that it makes or of those that it reads."""
        return self.kept_out is not None or self.kept_in is not None

    @abstractmethod
    def change(self) -> Tensor:
        """D (out, channels), before any masks."""

    def at_centre(self, D: Tensor) -> Tensor:
        """D (..., channels) as columns of W (..., channels * taps), in the middle of each channel's."""
        return nn.functional.pad(D[..., None], (self.taps // 2, self.taps // 2)).flatten(-2)

    def weight(self, W: Tensor) -> Tensor:
        W = W + self.at_centre(self.change()).to(W.dtype)
        if self.kept_in is not None:
            W = W * self.kept_in.repeat_interleave(self.taps)
        return W if self.kept_out is None else W * self.kept_out[:, None]

    def bias(self, b: Tensor | None) -> Tensor | None:
        if b is not None and self.beta is not None:
            b = (b + self.beta).to(b.dtype)
        return b if b is None or self.kept_out is None else b * self.kept_out

    def worth(self, site: Site, count: int) -> Tensor:
        """What each channel that it makes is worth, (count): the sum of |w'|^p over its rows."""
        rows = self.weight(at_least_fp32(site.weight)).abs().pow(self.settings.p)
        return rows.reshape(count, -1).sum(1)

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        makers: dict[str, list[tuple[Self, Site]]] = {}
        for adapter, site in adapters.items():
            if adapter.kept_out is not None:
                makers.setdefault(adapter.settings.outputs, []).append((adapter, site))
        for name, group in makers.items():
            readers = [a.kept_in for a in adapters if a.kept_in is not None and a.settings.inputs == name]
            _leave_out(group, readers, progress)
        for adapter in adapters:
            adapter.forget()
        return ()

    def forget(self) -> None:
        """Set to zero what belongs to channels that are left out, where momentum would move it still."""
        if self.leaves_out:
            for name, parameter in self.named_parameters():
                parameter.data.mul_(self._left(name))

    def _left(self, name: str) -> Tensor:
        """Which entries of a parameter belong to channels that are left; of its shape."""
        shape, left = getattr(self, name).shape, torch.ones((), dtype=torch.bool, device=getattr(self, name).device)
        for size, side in zip(shape, self.cuts[name], strict=True):
            kept = getattr(self, f"kept_{side}") if side else None
            left = left[..., None] & (left.new_ones(size) if kept is None else kept)
        return left

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        state = {
            f"{self.method}_kept_{side}": packed_bits(kept)
            for side in ("out", "in")
            if (kept := getattr(self, f"kept_{side}")) is not None
        }
        for name, parameter in self.named_parameters():
            state[f"{self.method}_{name}"] = parameter.detach()[self._left(name)].view(self._sizes(name))
        return state

    def _sizes(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter without what is left out."""
        kept = [getattr(self, f"kept_{side}") if side else None for side in self.cuts[name]]
        shape = getattr(self, name).shape
        return tuple(size if k is None else int(k.sum()) for size, k in zip(shape, kept, strict=True))

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        if self.beta is None and f"{self.method}_beta" in tensors:  # of a layer that stands for one with a bias
            self.beta = nn.Parameter(torch.zeros(site.out_features))
        for side in ("out", "in"):
            kept, found = getattr(self, f"kept_{side}"), tensors.get(f"{self.method}_kept_{side}")
            if kept is not None and found is not None and found.numel() == packed_bits(kept).numel():
                kept.copy_(unpacked_bits(found, kept.shape))
        own = self.peft_state(site)
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        for name, parameter in self.named_parameters():
            found = tensors[f"{self.method}_{name}"].to(parameter)
            parameter.detach().zero_()[self._left(name)] = found.flatten()


def _leave_out(makers: Sequence[tuple[ChannelMasked, Site]], readers: Sequence[Tensor], progress: float) -> None:
    """Leave out the channels of a group that are worth least, as many as it is time for, for good."""
    first = makers[0][0]
    assert first.kept_out is not None
    kept = first.kept_out.view(first.settings.heads or len(first.kept_out), -1)[:, 0].clone()
    count = first.settings.left(progress, len(kept))
    if count >= int(kept.sum()):
        return
    if any(len(mask) % len(kept) for mask in (*(a.kept_out for a, _ in makers), *readers)):  # type: ignore[arg-type]
        raise IsotuneError(
            f"the layers that make or read the channels {first.settings.outputs!r} differ in how many there are"
        )
    worth = torch.stack([adapter.worth(site, len(kept)).to(kept.device) for adapter, site in makers]).sum(0)
    (kept,) = largest_of_all([worth.masked_fill(~kept, -1.0)], count)
    for mask in (*(adapter.kept_out for adapter, _ in makers), *readers):
        assert mask is not None
        mask.copy_(kept.repeat_interleave(len(mask) // len(kept)))
