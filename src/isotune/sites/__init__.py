"""The kinds of part that adapters go on, one file a kind; `find` tells which a layer is."""

from isotune.sites.find import (
    CONVOLUTIONS,
    EMBEDDING,
    LINEAR,
    NORM,
    WHAT_CAN_BE_ADAPTED,
    current_entry,
    device_of,
    require_site,
    site_of,
    stored_layer,
)
from isotune.sites.linear import LinearSite
from isotune.sites.site import Site

__all__ = [
    "CONVOLUTIONS",
    "EMBEDDING",
    "LINEAR",
    "NORM",
    "WHAT_CAN_BE_ADAPTED",
    "LinearSite",
    "Site",
    "current_entry",
    "device_of",
    "require_site",
    "site_of",
    "stored_layer",
]
