"""Write spoken digits and commands in noise: `python examples/compare-audio/make_data.py runs/spoken`.

espeak-ng says each word in several voices (an accent and a variant of the throat), speeds and pitches. White noise is
added, and babble: other words, in the voices of the same split, on top of each other. The voices of train,
validation and test are different ones. Takes numpy and the program espeak-ng (`apt-get install espeak-ng`); the same
version of it and the same seed give the same files.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import wave
from functools import cache
from pathlib import Path

import numpy as np

WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
    "yes", "no", "stop", "go", "left", "right",
)  # fmt: skip
VOICES = {
    "train": (
        "en-us+m1", "en-us+f2", "en-us+m8", "en-gb+m2", "en-gb+f1", "en-gb-x-rp+m6", "en-029+f4", "en-us-nyc+m1",
    ),
    "validation": ("en-gb-scotland+m4", "en-us+f5", "en-gb-x-gbcwmd+m5"),
    "test": ("en-gb-x-gbclan+m3", "en-us+f3", "en-gb-scotland+f1", "en-gb+m7"),
}  # fmt: skip
RATE = 22050
"""espeak-ng's own."""
SECONDS = 1.0
LOUDEST, QUIETEST = 15.0, 0.0
"""Decibels of the word over the noise."""


@cache
def said(word: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """What espeak-ng says, without the silence around it: shape (samples,), of at most a clip's length."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
    done = subprocess.run(command, capture_output=True, check=True)
    with wave.open(io.BytesIO(done.stdout)) as file:
        assert file.getframerate() == RATE
        samples = np.frombuffer(file.readframes(-1), np.int16) / 32768
    (loud,) = np.nonzero(np.abs(samples) > 0.01)
    return samples[loud[0] : loud[-1] + 1][: round(SECONDS * RATE)]


def spoken(word: str, voice: str, draw: np.random.Generator) -> np.ndarray:
    """The word, of a loudness of 1, somewhere in a clip."""
    samples = said(word, voice, 5 * int(draw.integers(24, 45)), 10 * int(draw.integers(2, 9)))
    clip = np.zeros(round(SECONDS * RATE))
    start = int(draw.integers(0, len(clip) - len(samples) + 1))
    clip[start : start + len(samples)] = samples / samples.std()
    return clip


def noise(voices: tuple[str, ...], draw: np.random.Generator) -> np.ndarray:
    """Three words at once and white noise, of a loudness of 1."""
    babble = sum(spoken(str(draw.choice(WORDS)), str(draw.choice(voices)), draw) for _ in range(3))
    found = babble / np.std(babble) + draw.uniform(0.3, 1) * draw.standard_normal(round(SECONDS * RATE))
    return found / found.std()


def write(file: Path, samples: np.ndarray) -> None:
    """A WAV file of 16 bits, as loud as it can be."""
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(np.round(samples / np.abs(samples).max() * 32767).astype(np.int16).tobytes())


def main() -> None:
    """Write the folders."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--clips", type=int, nargs=3, default=[40, 12, 24], help="Of each word in each split.")
    options.add_argument("--seed", type=int, default=0)
    chosen = options.parse_args()
    for number, (split, clips) in enumerate(zip(VOICES, chosen.clips, strict=True)):
        draw = np.random.default_rng([chosen.seed, number])
        voices = VOICES[split]
        for word in WORDS:
            (chosen.folder / split / word).mkdir(parents=True)
            for clip in range(clips):
                gain = 10 ** (draw.uniform(QUIETEST, LOUDEST) / 20)
                samples = gain * spoken(word, voices[clip % len(voices)], draw) + noise(voices, draw)
                write(chosen.folder / split / word / f"{clip:03}.wav", samples)


if __name__ == "__main__":
    main()
