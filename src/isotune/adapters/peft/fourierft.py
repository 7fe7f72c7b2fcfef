"""FourierFT in PEFT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from isotune.adapters.peft.dialect import Dialect, NotInPEFTError
from isotune.adapters.settings import Settings
from isotune.adapters.spectral.sparse_spectrum import MOST
from isotune.sites import CONVOLUTIONS, Site


class FourierFTDialect(Dialect):
    """Numbers of frequencies by layer."""

    peft_type = "FOURIERFT"

    def config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        if len({(s.scale, s.seed) for s in settings.values()}) > 1:
            raise NotInPEFTError("PEFT's FourierFT has one scaling and one seed for all layers")
        counts = {path: s.n_frequency or MOST for path, s in settings.items()}
        common = Counter(counts.values()).most_common(1)[0][0]
        pattern = {path: n for path, n in counts.items() if n != common}
        if any(_matching(pattern, path, common) != n for path, n in counts.items()):
            raise NotInPEFTError("PEFT's n_frequency_pattern would give one layer the number of another's")
        first = next(iter(settings.values()))
        return {
            "n_frequency": common,
            "n_frequency_pattern": pattern,
            "scaling": first.scale,
            "random_loc_seed": first.seed,
            "init_weights": first.start == "zero",
            "bias": "none",
        }

    def refused(self, site: Site) -> str | None:
        if site.kind in CONVOLUTIONS:
            return "is a convolution, which PEFT's FourierFT does not adapt"
        if site.in_features * site.out_features < MOST:
            return f"has fewer than {MOST} weights, where PEFT's FourierFT refuses its default number of frequencies"
        return None

    def read(self, config: dict[str, Any], path: str) -> Settings:
        return self.settings(
            n_frequency=_matching(config.get("n_frequency_pattern") or {}, path, config["n_frequency"]),
            scale=config["scaling"],
            seed=config["random_loc_seed"],
            start="zero" if config.get("init_weights", False) else "random",
        )


def _matching(pattern: dict[str, int], path: str, default: int) -> int:
    """PEFT's rule: the first key that, as a regular expression, matches the path after a dot, or else the path."""
    key = next((key for key in pattern if re.match(rf".*\.{key}$", path)), path)
    return pattern.get(key, default)
