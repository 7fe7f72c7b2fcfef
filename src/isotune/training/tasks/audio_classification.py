"""Classification of sound, by models and feature extractors of transformers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError, IsotuneWarning
from isotune.training.classifiers import head_paths, load_classifier_of
from isotune.training.models import load_feature_extractor
from isotune.training.tasks.classification import Classification
from isotune.training.tasks.clips import Clip, as_clip, resampled
from isotune.training.tasks.collator import Example
from isotune.training.tasks.contract import named_or_guessed
from isotune.training.tasks.sequences import LABELS

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

LONGEST, SHORTEST = 30.0, 0.25
"""Seconds: where clips are cut for a model without a limit, and up to which silence fills them, for any model."""


class AudioClassification(Classification):
    """One of several labels for a clip of sound. Rows of `audio` and `label`."""

    rows_at_a_time = 16
    slow = ("audio",)

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """The sound and the label."""
        audio = named_or_guessed(data.audio, found, ("audio", "speech", "sound", "wav", "file", "file_name", "path"))
        return {"audio": audio, "label": named_or_guessed(data.label, found, (*LABELS, "command", "keyword"))}

    def cell(self, key: str, value: Any) -> Any:
        """A clip, of a file, of bytes or of an array."""
        return as_clip(value) if key == "audio" else super().cell(key, value)

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """The architecture's own classifier of sound, and where its clips are cut; Whisper reads no more."""
        model = load_classifier_of("sound", spec.model, spec.labels, spec.dtype, spec.quantization)
        spec = replace(spec, max_seconds=_longest(spec))
        if model.config.model_type == "whisper":
            _shorten(model.encoder, self.processor(spec, model).nb_max_frames)
        return model, head_paths(model), spec

    def processor(self, spec: TaskSpec, model: Any) -> Any:
        """The model's feature extractor; Whisper's fills clips up to whole seconds."""
        whisper = model.config.model_type == "whisper"
        options = {"chunk_length": math.ceil(spec.max_seconds or LONGEST)} if whisper else {}
        return load_feature_extractor(spec.model, **options)

    def collator(self, processor: Any) -> ClipCollator:
        """Waves become what the model reads as they are batched: that of a whole data set would be large."""
        return ClipCollator(processor)

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """The waves at the model's rate, cut at `spec.max_seconds`, which is said; labels where there are some."""
        longest = spec.max_seconds or LONGEST
        cut = sum(len(row["audio"].wave) > longest * row["audio"].rate for row in rows)
        if cut:
            warnings.warn(
                f"{cut} of {len(rows)} clips are longer than {longest:g} seconds and are cut there "
                "(data.max_seconds)",
                IsotuneWarning,
                stacklevel=2,
            )
        return [
            {
                "audio": _fitted(row["audio"], tokenizer.sampling_rate, longest),
                **({"labels": self.number(row["label"], spec)} if "label" in row else {}),
            }
            for row in rows
        ]

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its most probable label and that label's probability; of the clip its file's name."""
        named = [{**row, "audio": row["audio"].file or f"row {number}"} for number, row in enumerate(rows, start=1)]
        return super().predicted(named, scores, spec)


class ClipCollator:
    """Makes a batch of waves with a model's feature extractor."""

    def __init__(self, extractor: Any) -> None:
        self.extractor = extractor
        # Where a model takes clips of one length only, its extractor pads to that by itself.
        self.options: dict[str, Any] = {"padding": True} if _limit(extractor) is None else {}

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_values` or `input_features`, perhaps `attention_mask`, and `labels` where the examples have some."""
        batch = self.extractor(
            [example["audio"] for example in examples],
            sampling_rate=self.extractor.sampling_rate,
            return_tensors="pt",
            **self.options,
        )
        labels = {"labels": torch.tensor([e["labels"] for e in examples])} if "labels" in examples[0] else {}
        return {**batch, **labels}


def _fitted(clip: Clip, rate: int, longest: float) -> np.ndarray:
    """The clip's wave at a rate, no longer than so many seconds, and no shorter than `SHORTEST`."""
    wave = resampled(clip._replace(wave=clip.wave[: math.ceil(longest * clip.rate)]), rate)[: int(longest * rate)]
    return np.pad(wave, (0, max(0, math.ceil(SHORTEST * rate) - len(wave))))


def _longest(spec: TaskSpec) -> float:
    """Where clips are cut. Raises IsotuneError for a length that the model does not read."""
    limit = _limit(load_feature_extractor(spec.model))
    if spec.max_seconds is None:
        return limit or LONGEST
    if limit and spec.max_seconds > limit:
        raise IsotuneError(
            f"data.max_seconds is {spec.max_seconds:g}, but {spec.model} reads at most {limit:g} seconds"
        )
    return spec.max_seconds


def _limit(extractor: Any) -> float | None:
    """Seconds that the inputs of an extractor always have; None where they are as long as the clip."""
    if hasattr(extractor, "n_samples"):  # Whisper's
        return float(extractor.n_samples / extractor.sampling_rate)
    if hasattr(extractor, "max_length") and hasattr(extractor, "num_mel_bins"):  # a spectrogram's rows, of 10 ms
        return float(extractor.max_length) / 100
    return None


def _shorten(encoder: Any, frames: int) -> None:
    """Let Whisper's encoder read so many frames, where it reads more: the first rows of its table of positions."""
    positions = frames // (encoder.conv1.stride[0] * encoder.conv2.stride[0])
    if positions < encoder.max_source_positions:
        table = encoder.embed_positions.weight[:positions].detach().clone()
        encoder.embed_positions = nn.Embedding.from_pretrained(table)
        encoder.max_source_positions = encoder.config.max_source_positions = positions
