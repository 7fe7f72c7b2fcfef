"""OFT in PEFT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from isotune.adapters.orthogonal.oft import BLOCK
from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.peft.limits import terms_for_peft, terms_from_peft
from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import Site


class OFTDialect(Dialect):
    """One size of blocks for all layers; COFT's radius is measured otherwise."""

    peft_type = "OFT"
    own_tensors = frozenset({"oft_magnitude"})

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        s = self.same(settings)
        if s.magnitude:
            raise NotInPEFTError("PEFT's OFT has no magnitudes")
        eps = s.eps
        if eps is not None and s.radius == "official":
            if s.block is None or s.nearest:
                raise NotInPEFTError(
                    "PEFT's radius of COFT depends on the size of the blocks, which differs by layer"
                )
            eps = eps * s.block**2
        return {
            "r": s.blocks or 0,
            "oft_block_size": 0 if s.blocks else s.block or BLOCK,
            "block_share": s.share,
            **terms_for_peft(s.terms),
            "coft": eps is not None,
            "eps": 6e-5 if eps is None else eps,
            "module_dropout": s.dropout,
            "bias": "none",
            "init_weights": True,
        }

    def refused(self, site: Site) -> str | None:
        if site.kind in ("gpt2_conv1d", "conv1d", "conv3d"):
            return f"is of the kind {site.kind}, which PEFT's OFT does not adapt"
        if site.kind == "conv2d" and site.layer.kernel_size != (1, 1):
            return "is a convolution with a kernel above 1, whose patches PEFT's OFT sums up before it convolves them"
        return None

    def read(self, config: dict[str, Any], path: str) -> Settings:
        if "oft_block_size" not in config:
            raise OptionError("it is from a PEFT before 0.14, whose OFT had other parameters; train it anew")
        return self.settings(
            block=config["oft_block_size"] or None,
            blocks=config.get("r") or None,
            nearest=True,
            share=config.get("block_share", False),
            terms=terms_from_peft(config, default=True),
            eps=config.get("eps", 6e-5) if config.get("coft") else None,
            radius="peft",
            dropout=config.get("module_dropout", 0.0),
        )
