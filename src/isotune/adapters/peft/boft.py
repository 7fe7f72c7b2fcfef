"""BOFT in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.orthogonal.boft import BLOCK, FACTORS
from isotune.adapters.peft.dialect import Dialect
from isotune.adapters.peft.limits import uneven_convolution
from isotune.adapters.settings import Settings
from isotune.sites import Site


class BOFTDialect(Dialect):
    """One size of blocks for all layers."""

    peft_type = "BOFT"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        s = self.same(settings)
        return {
            "boft_block_size": 0 if s.blocks else s.block or BLOCK,
            "boft_block_num": s.blocks or 0,
            "boft_n_butterfly_factor": s.factors or FACTORS,
            "boft_dropout": s.dropout,
            "bias": "none",
            "init_weights": True,
        }

    def refused(self, site: Site) -> str | None:
        if site.kind not in ("linear", "conv2d"):
            return f"is of the kind {site.kind}, which PEFT's BOFT does not adapt"
        return uneven_convolution(site)

    def differs(self, own: Any, site: Site) -> str | None:
        b, m = own.sizes(site.in_features)
        if m != (own.factors or FACTORS) or not (own.blocks or b == (own.block or BLOCK)):
            return f"has blocks of {b} and factors={m}, because its width allows no others; PEFT has one size for all"
        return None

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            block=config.get("boft_block_size") or None,
            blocks=config.get("boft_block_num") or None,
            factors=config.get("boft_n_butterfly_factor", 1),
            dropout=config.get("boft_dropout", 0.0),
        )
