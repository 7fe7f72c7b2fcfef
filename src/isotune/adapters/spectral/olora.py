"""OLoRA, orthonormal low-rank adaptation.

    W' = W + s (B A - B0 A0),   B0 = Q[:, :r],   A0 = R[:r],   W = Q R

LoRA that starts at the first r columns of Q, which are orthonormal, and the first r rows of R. They reproduce the
first r columns of W; the part that is trained is s times theirs (the start is not divided by s).

Paper: "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024, arXiv 2406.01775.
Parameters: r (in + out). Cost for n rows: 4 n r (in + out) flops; at the start one QR of W.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from isotune.adapters.spectral.principal import PrincipalOfPEFT, PrincipalSettings
from isotune.linalg.triplets import leading_qr
from isotune.sites import Site


class OLoRA(PrincipalSettings):
    """W' = W + s (B A - B0 A0): LoRA from the QR decomposition of W."""

    dialect: ClassVar[str] = "isotune.adapters.peft.principal:OLoRADialect"

    name: ClassVar[str] = "olora"

    def shell(self, site: Site) -> OLoRAAdapter:
        return OLoRAAdapter(self.sizes(site))


class OLoRAAdapter(PrincipalOfPEFT):
    """Starts at the first columns of Q and rows of R."""

    method: ClassVar[str] = "olora"

    def start_from(self, W: Tensor, generator: torch.Generator | None = None) -> None:
        self.place(*leading_qr(W, self.A.shape[0]))

    def start_as_peft(self, site: Site) -> None:
        if site.kind != "gpt2_conv1d":
            super().start_as_peft(site)
            return
        # PEFT decomposes GPT-2's weight as it lies in memory, (in, out), and takes that part of it away from W, but
        # adds B A with B = Q[:, :r] and A = R[:r] the other way round: its model is changed from the start.
        Q, R = leading_qr(site.weight.mT, self.A.shape[0])
        self.place(R.mT, Q.mT)
