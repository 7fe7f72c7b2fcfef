"""What PEFT's layers of several methods have in common in what they cannot express."""

from __future__ import annotations

from typing import Any

from isotune.adapters.peft.dialect import NotInPEFTError
from isotune.errors import OptionError
from isotune.sites import Site


def terms_for_peft(terms: int | None) -> dict[str, Any]:
    """The fields of PEFT's config for an exact Cayley transform (None), or a series of so many terms."""
    if terms == 3:
        raise NotInPEFTError("PEFT computes four terms of the Neumann series where three are asked for")
    return {"use_cayley_neumann": terms is not None, "num_cayley_neumann_terms": terms or 5}


def terms_from_peft(config: dict[str, Any], default: bool) -> int | None:
    """The terms that PEFT computes for its config; `default` says what an absent `use_cayley_neumann` means."""
    if not config.get("use_cayley_neumann", default):
        return None
    terms = config.get("num_cayley_neumann_terms", 5)
    if terms < 3:
        raise OptionError(
            f"num_cayley_neumann_terms={terms} is not supported: with fewer than three terms PEFT's series is "
            "I + 2 Q or I, far from a rotation"
        )
    return max(terms, 4)


def uneven_convolution(site: Site) -> str | None:
    """Why PEFT computes something else on a convolution of which it takes the first number of each pair for both."""
    if site.kind != "conv2d":
        return None
    conv: Any = site.layer
    pairs = (conv.kernel_size, conv.stride, conv.padding)
    if isinstance(conv.padding, str) or any(first != second for first, second in pairs):
        return "is a convolution whose kernel, stride or padding is not the same in both directions"
    return None
