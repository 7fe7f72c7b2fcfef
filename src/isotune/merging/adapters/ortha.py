"""Whether adapters trained by Orthogonal Adaptation keep what it promises: that they do not act on each other."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from isotune.adapters.low_rank.ortha import OrthA
from isotune.adapters.settings import Settings


def ortha_conflicts(settings: Mapping[str, Settings], n_in: int) -> list[str]:
    """What keeps the `ortha` adapters at one layer from being orthogonal, a line each; nothing where they are.

    Args:
        settings: The settings of each adapter at the layer, by the adapter's name; other methods are passed over.
        n_in: The inputs of the layer, columns of W.
    """
    own = {name: s for name, s in settings.items() if isinstance(s, OrthA)}
    found = []
    if len({(s.basis_seed, s.construction) for s in own.values()}) > 1:
        bases = ", ".join(f"{name} ({s.construction}, seed {s.basis_seed})" for name, s in own.items())
        found.append(f"they are made from different bases, and overlap as any two adapters do: {bases}")
    total = sum(s.rank for s in own.values())
    if len(own) > 1 and total > n_in:
        found.append(f"their ranks add up to {total}, and only {n_in} directions can be orthogonal in this layer")
    for (one, a), (other, b) in combinations(own.items(), 2):
        if (a.basis_seed, a.construction) == (b.basis_seed, b.construction) and (what := _overlap(a, b, n_in)):
            found.append(f"{one} and {other} {what}")
    return found


def _overlap(a: OrthA, b: OrthA, n_in: int) -> str | None:
    one, other = a.part(), b.part()
    if one is not None and one == other and (a.rank == b.rank or a.construction == "gaussian"):
        return f"have the same {one[0]}, {one[1]}: they read the same inputs, and add up as any two adapters do"
    if a.construction == "gaussian":
        return f"have random entries, orthogonal only on average (to about {n_in**-0.5:.2g})"
    if one is None or other is None:
        expected = a.rank * b.rank / n_in
        return f"were not both given a slot or a concept: on average they share {expected:.2g} columns of the basis"
    shared = set(a.columns(n_in, one).tolist()) & set(b.columns(n_in, other).tolist())
    return f"share {len(shared)} of {min(a.rank, b.rank)} columns of the basis" if shared else None
