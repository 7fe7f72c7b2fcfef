"""What to call the models that are merged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from isotune.errors import OptionError


def model_names(folders: Sequence[str | Path], names: Sequence[str] | None = None) -> list[str]:
    """The names given, or of each path the shortest end that tells it apart from the others.

    Raises OptionError for no folders, one that is given twice without names, a wrong number of names, or names that
    are not all different.
    """
    if not folders:
        raise OptionError("there is nothing to merge; name at least one folder")
    if names is None:
        return _ends([Path(folder).absolute().parts for folder in folders])
    if len(names) != len(folders):
        raise OptionError(
            f"{len(names)} names were given for {len(folders)} models; give one each, in the same order"
        )
    if len(set(names)) < len(names):
        raise OptionError(f"the names {', '.join(names)} are not all different; give each model its own")
    return list(names)


def _ends(paths: Sequence[tuple[str, ...]]) -> list[str]:
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise OptionError(f"{Path(*twice)} is given twice; give it once, with twice the weight, or give names")
    ends = ["/".join(path[-1:]) for path in paths]
    length = 1
    while len(set(ends)) < len(ends):
        length += 1
        ends = [
            "/".join(path[-length:]) if ends.count(end) > 1 else end for end, path in zip(ends, paths, strict=True)
        ]
    return ends
