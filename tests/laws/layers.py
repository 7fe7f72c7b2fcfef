"""Draw layers of every kind, and inputs for them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

KINDS = ("linear", "conv1d", "conv2d", "embedding")
SIZES = st.integers(2, 8)


@st.composite
def drawn_layer(draw: DrawFn, kind: str) -> nn.Module:
    """A layer of the given kind, in float64, its values drawn by torch."""
    layer = {"linear": _linear, "conv1d": _conv1d, "conv2d": _conv2d, "embedding": _embedding}[kind](draw)
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


def _conv2d(draw: DrawFn) -> nn.Module:
    groups = draw(st.integers(1, 2))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    step = st.tuples(st.integers(1, 2), st.integers(1, 2))
    padding = draw(st.one_of(st.tuples(st.integers(0, 2), st.integers(0, 2)), st.sampled_from(["same", "valid"])))
    return nn.Conv2d(
        groups * draw(st.integers(2, 3)),
        groups * draw(st.integers(2, 3)),
        draw(pair),
        stride=1 if padding == "same" else draw(step),
        padding=padding,
        dilation=draw(step),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


def _embedding(draw: DrawFn) -> nn.Module:
    count = draw(st.integers(4, 9))
    return nn.Embedding(count, draw(SIZES), padding_idx=draw(st.one_of(st.none(), st.integers(0, count - 1))))


def input_for(layer: nn.Module, rows: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input with about that many rows; for an embedding, every index at least once."""
    generator = torch.Generator().manual_seed(seed)
    if isinstance(layer, nn.Embedding):
        return torch.arange(max(rows, layer.num_embeddings)).remainder(layer.num_embeddings).reshape(1, -1)
    if isinstance(layer, nn.Conv2d):
        return torch.randn(2, layer.in_channels, 7, 6, generator=generator).to(dtype)
    n_in = layer.in_features if isinstance(layer, nn.Linear) else layer.weight.shape[0]
    return torch.randn(2, rows // 2, n_in, generator=generator).to(dtype)


def strides_with_dilation(layer: nn.Module) -> bool:
    """Whether it is a convolution with stride and dilation: torch's bf16 form gives NaN at times, on CPUs."""
    return isinstance(layer, nn.Conv2d) and max(layer.stride) > 1 and max(layer.dilation) > 1
