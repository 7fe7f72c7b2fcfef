"""Bottleneck adapters of Houlsby and of Pfeiffer: a narrow network behind a block, with a residual of its own.

    y = z + U gelu(D z + d) + u,   z = f(x)

Houlsby's are on the attention and on the MLP of each layer, `targets=["attention", "mlp"]` in the words of the model,
Pfeiffer's on the MLP alone; both can be beside the block as well (`place="parallel"`). In the code for spectrograms D
and U both start at zero, where no gradient reaches either; here U alone does.

Papers: "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv 1902.00751; "AdapterFusion: Non-Destructive
Task Composition for Transfer Learning", EACL 2021, arXiv 2005.00247; "Parameter-Efficient Transfer Learning of Audio
Spectrogram Transformers", 2023, arXiv 2312.03694. Parameters: 2 d r + r + d. Cost for n rows: 4 n d r flops. It is no
change of a weight.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from isotune.adapters.bottleneck.bottleneck import BottleneckSettings


class Houlsby(BottleneckSettings):
    """y = z + U gelu(D z + d) + u, z = f(x): a bottleneck behind a block."""

    name: ClassVar[str] = "houlsby"
    learning_rate: ClassVar[float] = 5e-3
    formula: ClassVar[str] = "2 * rank * n_out + rank + n_out"

    place: Literal["parallel", "sequential"] = Field(
        "sequential", description="Whether D reads what the block reads (parallel), or what it gives (sequential)."
    )
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("gelu", description="Between D and U.")
