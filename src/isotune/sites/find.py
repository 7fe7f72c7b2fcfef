"""The kinds of site, and which of them a layer is."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from isotune.bare import HOME, bare_class
from isotune.errors import TargetError
from isotune.matrix import Matrix
from isotune.sites.block import Block
from isotune.sites.convolution import Conv1dSite, Conv2dSite, Conv3dSite
from isotune.sites.embedding import EmbeddingSite
from isotune.sites.gpt2 import GPT2Conv1DSite
from isotune.sites.linear import LinearSite, PackedLinearSite
from isotune.sites.matrix import MatrixSite
from isotune.sites.norm import NormSite
from isotune.sites.site import Site

LINEAR = frozenset({"linear", "gpt2_conv1d"})
CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d"})
EMBEDDING = frozenset({"embedding"})
NORM = frozenset({"norm"})

LINEAR_MAPS: tuple[type[Site], ...] = (
    LinearSite, PackedLinearSite, MatrixSite, GPT2Conv1DSite, Conv1dSite, Conv2dSite, Conv3dSite, EmbeddingSite,
)  # fmt: skip
_BY_NAME: dict[str, type[Site]] = {
    kind.kind: kind
    for kind in (
        LinearSite, GPT2Conv1DSite, Conv1dSite, Conv2dSite, Conv3dSite, EmbeddingSite, NormSite, Block,
    )
}  # fmt: skip

WHAT_CAN_BE_ADAPTED = "Linear, GPT-2's Conv1D, convolutions of one to three dimensions, and Embedding"


def site_of(layer: nn.Module, kinds: Collection[str] = ()) -> Site | None:
    """The site of a layer, or None where no kind fits (also for a subclass that computes something else).

    Norms count where "norm" is among `kinds`. Where "block" is, any module is one, unless it is of another of these.
    """
    found = next((kind(layer) for kind in LINEAR_MAPS if kind.of(layer)), None)
    if found is None and "norm" in kinds and NormSite.of(layer):
        return NormSite(layer)
    return Block(layer) if "block" in kinds and (found is None or found.kind not in kinds) else found


def require_site(layer: nn.Module, name: str) -> Site:
    """The site of the layer called `name`; raises TargetError where it has none."""
    # A block that has adapters was asked for as one.
    site = site_of(layer, NORM) or (Block(layer) if HOME in layer._modules else None)
    if site is None:
        raise TargetError(
            f"the layer {name!r} is a {bare_class(layer).__name__}, which cannot be adapted; the kinds that can are "
            f"{WHAT_CAN_BE_ADAPTED}"
        )
    return site


def stored_layer(kind: str, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    """A layer of the given kind of site that holds `weight` (in the layer's own shape), `bias`, and nothing else."""
    layer = _BY_NAME[kind].hollow(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def current_entry(entry: dict[str, Any]) -> dict[str, Any]:
    """What a header says of a site, in the words of today: version 0.1.0 called GPT-2's layers conv1d."""
    older = entry["kind"] == "conv1d" and len(entry["shape"]) == 2
    return {**entry, "kind": "gpt2_conv1d"} if older else entry


def device_of(layer: nn.Module) -> torch.device:
    """Where the layer's weight lives."""
    if isinstance(layer, Matrix):
        return layer.parameter.device
    return next(itertools.chain(layer.parameters(), layer.buffers())).device
