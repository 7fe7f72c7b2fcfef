"""The one family of exceptions. Every message says what was asked, what was found, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class IsotuneError(Exception):
    """A user's mistake or an unusable input; the command line prints it and exits with code 2."""


class OptionError(IsotuneError):
    """An unknown method or option, or a value out of bounds."""


class TargetError(IsotuneError):
    """A target that matches no layer, or a layer that a method cannot adapt."""


class CheckpointError(IsotuneError):
    """An adapter folder that cannot be read, written, or applied to this base model."""


class DivergedError(IsotuneError):
    """The training loss is not finite any more."""


class NoLowRankFormError(IsotuneError):
    """An adapter without an exact low-rank form was asked for one."""


class NoWeightError(IsotuneError):
    """An adapter whose change is none of a weight was asked for the changed weight."""


class DataError(IsotuneError):
    """A data file, column or row that cannot be used."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the known word nearest to `word`, or an empty string."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


class IsotuneWarning(UserWarning):
    """Something was done in a way that one may not have wanted; the message says what, and what to write."""
