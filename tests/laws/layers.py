"""Draw layers of every kind, and inputs for them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from isotune.sites import CONVOLUTIONS

KINDS = ("linear", "gpt2_conv1d", "convolution", "embedding", "norm")
"""Kinds of site as the laws draw them; a convolution is one of one, two or three dimensions."""
SIZES = st.integers(2, 8)


def fits(kind: str, declared: Collection[str]) -> bool:
    """Whether a method that declares these kinds is put to the laws on this one."""
    return bool(CONVOLUTIONS & set(declared)) if kind == "convolution" else kind in declared


@st.composite
def drawn_layer(draw: DrawFn, kind: str, declared: Collection[str] = CONVOLUTIONS) -> nn.Module:
    """A layer of the given kind, in float64, its values drawn by torch."""
    if kind == "convolution":
        layer = _convolution(draw, draw(st.sampled_from(sorted(CONVOLUTIONS & set(declared)))))
    else:
        layer = {"linear": _linear, "gpt2_conv1d": _conv1d, "embedding": _embedding, "norm": _norm}[kind](draw)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    with torch.no_grad():
        # Every entry, also the bias of a Conv1D (zero at first) and an embedding's padding row.
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer.to(torch.float64)


def _linear(draw: DrawFn) -> nn.Module:
    return nn.Linear(draw(SIZES), draw(SIZES), bias=draw(st.booleans()))


def _conv1d(draw: DrawFn) -> nn.Module:
    return Conv1D(draw(SIZES), draw(SIZES))


def _convolution(draw: DrawFn, kind: str) -> nn.Module:
    n = int(kind[4])
    groups = draw(st.integers(1, 2))

    def each(low: int, high: int) -> tuple[int, ...]:
        return draw(st.tuples(*[st.integers(low, high)] * n))

    kernel = each(1, 3 if n < 3 else 2)
    padding: Any = draw(st.sampled_from(["same", "valid", None]))
    return {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[n](
        groups * draw(st.integers(2, 3)),
        groups * draw(st.integers(2, 3)),
        kernel,
        stride=1 if padding == "same" else each(1, 2),
        padding=each(0, 2) if padding is None else padding,
        dilation=each(1, 2),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


def _embedding(draw: DrawFn) -> nn.Module:
    count = draw(st.integers(4, 9))
    return nn.Embedding(count, draw(SIZES), padding_idx=draw(st.one_of(st.none(), st.integers(0, count - 1))))


def _norm(draw: DrawFn) -> nn.Module:
    d = draw(SIZES)
    return nn.LayerNorm(d, bias=draw(st.booleans())) if draw(st.booleans()) else nn.RMSNorm(d, eps=1e-6)


def input_for(layer: nn.Module, rows: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input with about that many rows; for an embedding, every index at least once."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.arange(max(rows, layer.num_embeddings)).remainder(layer.num_embeddings).reshape(1, -1)
    if isinstance(layer, _ConvNd):
        sizes = {1: (9,), 2: (7, 6), 3: (5, 4, 4)}[len(layer.kernel_size)]
        return torch.randn(2, layer.in_channels, *sizes, generator=generator).to(dtype)
    n_in: int = layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
    return torch.randn(2, rows // 2, n_in, generator=generator).to(dtype)


def strides_with_dilation(layer: nn.Module) -> bool:
    """Whether it is a convolution with stride and dilation: torch's bf16 form gives NaN at times, on CPUs."""
    return isinstance(layer, _ConvNd) and max(layer.stride) > 1 and max(layer.dilation) > 1
