"""VeRA and RandLoRA, whose random matrices all layers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, other_kind
from isotune.adapters.settings import Settings
from isotune.sites import LINEAR, Site


class RandomProjectionsDialect(Dialect):
    """What the two have in common."""

    def refused(self, site: Site) -> str | None:
        return other_kind(site, *LINEAR)

    def common_fields(self, own: Any) -> dict[str, Any]:
        """Their common options in PEFT's config."""
        return {
            "r": own.rank,
            "projection_prng_key": own.projection_seed,
            "save_projection": own.save_projection,
            f"{own.name}_dropout": own.dropout,
            "bias": "none",
            "init_weights": True,
        }

    def common_options(self, config: dict[str, Any]) -> dict[str, Any]:
        """The same from PEFT's config."""
        return {
            "rank": config["r"],
            "projection_seed": config["projection_prng_key"],
            "save_projection": config["save_projection"],
            "dropout": config[f"{self.method.name}_dropout"],
        }


class VeRADialect(RandomProjectionsDialect):
    """Vectors d and b of each layer."""

    peft_type = "VERA"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        return self.common_fields(own) | {"d_initial": own.start}

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(start=config["d_initial"], **self.common_options(config))


class RandLoRADialect(RandomProjectionsDialect):
    """Pairs its bases in an order of its own."""

    peft_type = "RANDLORA"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        own = self.same(settings)
        if not own.legacy_pairing:
            raise NotInPEFTError("PEFT pairs RandLoRA's bases in another order than the paper (legacy_pairing=True)")
        if own.over_root:
            raise NotInPEFTError("PEFT's RandLoRA does not divide by the root of the number of bases")
        return self.common_fields(own) | {
            "randlora_alpha": own.resolved_alpha,
            "sparse": own.bases == "sparse",
            "very_sparse": own.bases == "very sparse",
        }

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            alpha=config["randlora_alpha"],
            bases="very sparse" if config["very_sparse"] else "sparse" if config["sparse"] else "uniform",
            legacy_pairing=True,
            **self.common_options(config),
        )
