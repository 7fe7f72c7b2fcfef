"""LoHa and LoKr, which came to PEFT from LyCORIS."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError, other_kind
from isotune.adapters.peft.patterns import common_and_rest, value_at
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import Site


class LoHaDialect(Dialect):
    """Ranks and scales may differ from layer to layer; a convolution's kernel is one matrix."""

    peft_type = "LOHA"
    prefix = "hada_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        rank, rank_pattern = common_and_rest({path: s.rank for path, s in settings.items()})
        alpha, alpha_pattern = common_and_rest({path: s.resolved_alpha for path, s in settings.items()})
        return {
            "r": rank, "alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern,
            "rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False, "init_weights": True,
        }  # fmt: skip

    def refused(self, site: Site) -> str | None:
        return other_kind(site, "linear", "conv1d", "conv2d")

    def read(self, config: dict[str, Any], path: str) -> Settings:
        unsupported = ("rank_dropout", "module_dropout", "use_effective_conv2d")
        if asked := [f"{key}={config[key]!r}" for key in unsupported if config.get(key)]:
            name = self.method.name
            raise OptionError(f"{name}: this PEFT adapter uses {', '.join(asked)}, which {name} does not have")
        rank = value_at(config.get("rank_pattern") or {}, path, config["r"])
        alpha = value_at(config.get("alpha_pattern") or {}, path, config["alpha"])
        return self.settings(rank=rank, alpha=alpha, **self.own(config))

    def own(self, config: dict[str, Any]) -> dict[str, Any]:
        """The options that are this method's alone."""
        return {}


class LoKrDialect(LoHaDialect):
    """One rule for all layers splits their sides, and says what has a low rank."""

    peft_type = "LOKR"
    prefix = "lokr_"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if len({(s.factor, s.both) for s in settings.values()}) > 1:
            raise NotInPEFTError("PEFT's LOKR splits all layers by one rule")
        first = next(iter(settings.values()))
        own = {"decompose_both": first.both, "decompose_factor": first.factor or -1, "rank_dropout_scale": False}
        return super().config(settings) | own

    def own(self, config: dict[str, Any]) -> dict[str, Any]:
        factor = config.get("decompose_factor", -1)
        return {"factor": None if factor == -1 else factor, "both": config.get("decompose_both", False)}
