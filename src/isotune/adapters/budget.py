"""Size a method so that it trains about as many parameters as asked: the ground of every fair comparison."""

from __future__ import annotations

from collections.abc import Sequence

from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import Site


def total_parameters(settings: Settings, sites: Sequence[Site]) -> int:
    """What the method trains on all of the sites, and keeps after training."""
    return sum(settings.kept_count(site) for site in sites) + shared_parameters(settings, sites)


def shared_parameters(settings: Settings, sites: Sequence[Site]) -> int:
    """What the method trains in common on all of the sites."""
    return sum(tensor.numel() for tensor in settings.shared(sites).values()) if settings.trains_shared else 0


def nearest_to(budget: int, settings: Settings, sites: Sequence[Site]) -> Settings:
    """The settings with their size (rank, block size, ...) chosen so that the parameters on `sites` come nearest.

    A method without such an option, and one whose options all fail on these sites, stays as it is; of two sizes
    equally near, the smaller is taken.
    """
    name = settings.size_option
    if name not in type(settings).model_fields:
        return settings
    options = settings.model_dump(exclude_unset=True)
    found = []
    largest = max(max(site.in_features, site.out_features) for site in sites)
    if name != "rank":  # a number of coefficients may be as large as the weight
        largest = max(largest, budget // len(sites))
    for value in range(1, 1 + largest):
        try:
            sized = type(settings)(**{**options, name: value})
            found.append((abs(total_parameters(sized, sites) - budget), value, sized))
        except OptionError:
            continue
    for _, _, sized in sorted(found, key=lambda entry: entry[:2]):
        if _fits(sized, sites):
            return sized
    return settings


def _fits(settings: Settings, sites: Sequence[Site]) -> bool:
    """Whether the method can be built on each shape that occurs."""
    try:
        for site in {(site.kind, *site.shape): site for site in sites}.values():
            settings.check(site)
    except OptionError:
        return False
    return True
