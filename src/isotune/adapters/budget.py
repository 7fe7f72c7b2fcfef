"""Size a method so that it trains about as many parameters as asked: the ground of every fair comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from isotune.adapters.settings import Settings
from isotune.errors import OptionError
from isotune.sites import Site


def total_parameters(settings: Settings, sites: Mapping[str, Site]) -> int:
    """What the method trains on all of the sites, by path, and keeps after training."""
    return sum(settings.kept_count(site) for site in sites.values()) + settings.shared_count(sites)


def nearest_to(budget: int, settings: Settings, sites: Mapping[str, Site]) -> Settings:
    """The settings with their size (rank, block size, ...) chosen so that the parameters on `sites` come nearest.

    A method without such an option, and one whose options all fail on these sites, stays as it is; of two sizes
    equally near, the smaller is taken.
    """
    name = settings.size_option
    if name not in type(settings).model_fields:
        return settings
    options = settings.model_dump(exclude_unset=True)
    found = []
    largest = max(max(site.in_features, site.out_features) for site in sites.values())
    if name != "rank":  # a number of coefficients may be as large as the weight
        largest = max(largest, budget // len(sites))
    for value in range(1, 1 + largest):
        try:
            sized = type(settings)(**{**options, name: value})
            found.append((abs(total_parameters(sized, sites) - budget), value, sized))
        except OptionError:
            continue
    for _, _, sized in sorted(found, key=lambda entry: entry[:2]):
        if _fits(sized, sites.values()):
            return sized
    return settings


def _fits(settings: Settings, sites: Iterable[Site]) -> bool:
    """Whether the method can be built on each shape that occurs."""
    try:
        for site in {(site.kind, *site.shape): site for site in sites}.values():
            settings.check(site)
    except OptionError:
        return False
    return True
