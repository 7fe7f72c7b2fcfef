"""Whisper tiny.en from its package: read as CTranslate2 reads it, and as a base for adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import isotune
from isotune.checkpoint.base import WHISPER, local_folder
from isotune.training.models import load_feature_extractor
from isotune.training.session import Session, TaskSpec

pytestmark = [
    pytest.mark.models,
    pytest.mark.skipif(local_folder(WHISPER) is None, reason="the package with Whisper is not installed"),
]
REFERENCE = Path(__file__).with_name("whisper_ctranslate2.json")
"""What CTranslate2 computes on the same file; `write_whisper_reference.py` writes it."""
START = [50257, 50362]


def chirps(rate: int = 16000, seconds: float = 3.0) -> np.ndarray:
    """As in `write_whisper_reference.py`."""
    times = np.arange(round(rate * seconds)) / rate
    rising = np.sin(2 * np.pi * (200 * times + 150 * times**2)) * np.sin(np.pi * times) ** 2
    falling = np.sin(2 * np.pi * (2500 * times - 300 * times**2)) * np.cos(2 * np.pi * times) ** 2
    return (0.4 * rising + 0.2 * falling).astype(np.float32)


def test_it_computes_what_ctranslate2_does() -> None:
    told = json.loads(REFERENCE.read_text())
    model = transformers.WhisperForConditionalGeneration.from_pretrained(local_folder(WHISPER), dtype=torch.float32)
    features = load_feature_extractor(WHISPER)([chirps()], sampling_rate=16000, return_tensors="pt").input_features
    with torch.no_grad():
        encoded = model.eval().model.encoder(features).last_hidden_state[0]
        ids = torch.tensor([START])
        for _ in told["greedy"]:
            logits = model(input_features=features, decoder_input_ids=ids).logits[0, -1]
            logits[[*model.generation_config.suppress_tokens]] = -torch.inf
            if ids.shape[1] == len(START):
                logits[[*model.generation_config.begin_suppress_tokens]] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    for frame, values in told["frames"].items():
        torch.testing.assert_close(encoded[int(frame), :8], torch.tensor(values), rtol=0, atol=2e-3)
    assert encoded.norm().item() == pytest.approx(told["norm"], rel=1e-4)
    assert ids[0, len(START) :].tolist() == told["greedy"]


def test_its_tokenizer_reads_back_what_it_wrote() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(local_folder(WHISPER))
    ids = tokenizer(" Seven times, he said.")["input_ids"]
    assert ids[:2] == START
    assert tokenizer.decode(ids, skip_special_tokens=True) == " Seven times, he said."


def test_every_kind_of_adapter_starts_as_the_classifier_of_one_second() -> None:
    spec = replace(
        TaskSpec.plain("causal-lm", WHISPER), task="audio-classification", labels=["a", "b"], max_seconds=1
    )
    batch = load_feature_extractor(WHISPER, chunk_length=1)(
        [chirps(seconds=1)], sampling_rate=16000, return_tensors="pt"
    )
    for name, targets in (("hra", "query-value"), ("houlsby", ["self_attn", "fc2"]), ("bitfit", None), ("ssf", None)):
        session = Session(spec)
        model = session.model.eval()
        with torch.no_grad():
            before = model(**batch).logits
            isotune.adapt(model, isotune.method(name), targets, train_also=session.head).eval()
            torch.testing.assert_close(model(**batch).logits, before, rtol=1e-4, atol=1e-5)
