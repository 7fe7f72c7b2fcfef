"""Clips of sound: read from a file, bytes or an array, brought to one channel and to a rate."""

from __future__ import annotations

import io
import math
from typing import Any, NamedTuple

import numpy as np

from isotune.errors import IsotuneError

_MISSING = "sound takes packages to read: pip install 'isotune[audio]'"


class Clip(NamedTuple):
    """A sound of one channel."""

    wave: np.ndarray
    """Shape (samples,), float32."""
    rate: int
    """Samples a second."""
    file: str
    """The name it was stored under; empty where it had none."""


def as_clip(value: Any) -> Clip:
    """A cell as a clip: a file's path, its bytes, or data sets' {"bytes", "path"} and {"array", "sampling_rate"}.

    Channels are averaged. Raises ValueError, whose message completes "the row has ...", where it is no sound, and
    IsotuneError without soundfile.
    """
    if isinstance(value, dict):
        file = value.get("path") or ""
        if value.get("array") is not None:
            return _of_array(value["array"], value.get("sampling_rate"), file)
        value = value.get("bytes") or file
    else:
        file = value if isinstance(value, str) else ""
    if not isinstance(value, (str, bytes)) or not value:
        raise ValueError("nothing" if not value else f"a {type(value).__name__} and no sound")
    return _decoded(value, file)


def _decoded(source: str | bytes, file: str) -> Clip:
    try:
        import soundfile
    except (ImportError, OSError):  # OSError: no libsndfile on this system
        raise IsotuneError(_MISSING) from None
    try:
        wave, rate = soundfile.read(io.BytesIO(source) if isinstance(source, bytes) else source, dtype="float32")
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise ValueError(f"no sound that can be read ({error})") from None
    return _checked(wave.mean(-1) if wave.ndim == 2 else wave, rate, file)


def _of_array(array: Any, rate: Any, file: str) -> Clip:
    try:
        wave = np.asarray(array, dtype=np.float32)
    except (TypeError, ValueError):
        raise ValueError("an array that is not of numbers") from None
    if wave.ndim != 1:
        raise ValueError(f"an array of shape {wave.shape}, which is not that of one channel,")
    if not isinstance(rate, (int, float)) or rate < 1 or rate != int(rate):
        raise ValueError(f"an array with the sampling_rate {rate!r}, which is no number of samples a second,")
    return _checked(wave, int(rate), file)


def _checked(wave: np.ndarray, rate: int, file: str) -> Clip:
    if not len(wave):
        raise ValueError("a sound without samples")
    if not np.isfinite(wave).all():
        raise ValueError("a sound that is not finite")
    return Clip(wave, rate, file)


def resampled(clip: Clip, rate: int) -> np.ndarray:
    """The wave at another rate, shape (samples,), float32; low-pass filtered where that is lower."""
    if clip.rate == rate:
        return clip.wave
    try:
        from scipy.signal import resample_poly
    except ImportError:
        raise IsotuneError(_MISSING) from None
    common = math.gcd(clip.rate, rate)
    found: np.ndarray = resample_poly(clip.wave, rate // common, clip.rate // common)
    return found.astype(np.float32)
