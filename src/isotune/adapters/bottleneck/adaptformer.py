"""AdaptFormer: a bottleneck beside the MLP of each layer, scaled and added to what the MLP gives.

    y = f(x) + a (U relu(D x + d) + u),   a = 0.1

Targets are blocks: `targets=["mlp"]`, or whatever the model calls them. The authors' code reads the layer's residual
stream before the norm, the paper's figure after it: on an MLP that gets normalised inputs it is after the norm, on a
block that contains the norm before it. U starts at zero, so that the model is unchanged at first.

Paper: "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022, arXiv 2205.13535.
Parameters: 2 d r + r + d. Cost for n rows: 4 n d r flops. It is no change of a weight.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from isotune.adapters.bottleneck.bottleneck import BottleneckSettings


class AdaptFormer(BottleneckSettings):
    """y = f(x) + a (U relu(D x + d) + u): a bottleneck beside a block."""

    name: ClassVar[str] = "adaptformer"
    learning_rate: ClassVar[float] = 2e-3

    scale: float = Field(0.1, gt=0, description="Factor on the change; the paper's s.")
    dropout: float = Field(0.1, ge=0, lt=1, description="Dropout between the activation and U while training.")
