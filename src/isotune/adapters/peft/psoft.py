"""PSOFT in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect
from isotune.adapters.peft.limits import terms_for_peft, terms_from_peft
from isotune.adapters.settings import Settings
from isotune.sites import Site


class PSOFTDialect(Dialect):
    """One set of options for all layers."""

    peft_type = "PSOFT"
    own_tensors = frozenset({"psoft_A", "psoft_B"})

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        s = self.same(settings)
        return {
            "r": s.rank,
            "psoft_alpha": s.rank,
            "psoft_dropout": s.dropout,
            "ab_svd_init": "psoft_init" if s.basis == "orthonormal" else "pissa_init",
            "psoft_svd": s.svd,
            "psoft_svd_lowrank_niter": s.iterations,
            "random_seed": s.svd_seed,
            "psoft_orth": s.orthogonal,
            "psoft_mag_b": s.scale_out,
            "psoft_mag_a": s.scale_in,
            **terms_for_peft(s.terms),
            "cayley_neumann_eps": s.largest if s.terms else None,
            "init_weights": True,
        }

    def refused(self, site: Site) -> str | None:
        return None if site.kind == "linear" else f"is of the kind {site.kind}, which PEFT's PSOFT does not adapt"

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            rank=config["r"],
            orthogonal=config.get("psoft_orth", True),
            scale_out=config.get("psoft_mag_b", True),
            scale_in=config.get("psoft_mag_a", True),
            basis="balanced" if config.get("ab_svd_init") == "pissa_init" else "orthonormal",
            terms=terms_from_peft(config, default=False),
            largest=config.get("cayley_neumann_eps"),
            svd=config.get("psoft_svd", "full"),
            iterations=config.get("psoft_svd_lowrank_niter", 10),
            svd_seed=config.get("random_seed", 0),
            dropout=config.get("psoft_dropout", 0.0),
        )
