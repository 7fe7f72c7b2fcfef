"""Tones as data, and tiny random models: Whisper on log-mel spectra, AST on patches, wav2vec 2.0 on waves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import torch
import transformers

RATE = 16000
TONES = {"low": 300.0, "high": 2400.0}


def tone(label: str, draw: np.random.Generator, seconds: float = 0.5, rate: int = RATE) -> np.ndarray:
    """A tone of about the label's pitch, in noise."""
    times = np.arange(round(seconds * rate)) / rate
    pitch = TONES[label] * draw.uniform(0.9, 1.1)
    wave = 0.3 * np.sin(2 * np.pi * (pitch * times + draw.uniform())) + 0.02 * draw.standard_normal(len(times))
    return wave.astype(np.float32)


def write_tones(folder: Path, splits: dict[str, int]) -> Path:
    """Folders of WAV files named for their labels, so many of each label under the name of each split."""
    draw = np.random.default_rng(0)
    for split, count in splits.items():
        for label in TONES:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                soundfile.write(folder / split / label / f"{number}.wav", tone(label, draw), RATE)
    return folder


def make_model(kind: str, folder: Path) -> Path:
    """A random model of two layers with its feature extractor."""
    torch.manual_seed(0)
    model, extractor = {"whisper": _whisper, "ast": _ast, "wav2vec2": _wav2vec2}[kind]()
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return folder


def _whisper() -> tuple[transformers.PreTrainedModel, transformers.FeatureExtractionMixin]:
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=16, encoder_layers=2, decoder_layers=1, d_model=32, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_source_positions=150,
        max_target_positions=16, classifier_proj_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=3, suppress_tokens=None, begin_suppress_tokens=None, init_std=0.2,
    )  # fmt: skip
    return transformers.WhisperModel(config), transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=3)


def _ast() -> tuple[transformers.PreTrainedModel, transformers.FeatureExtractionMixin]:
    config = transformers.ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_length=64,
        num_mel_bins=32, patch_size=16, frequency_stride=16, time_stride=16,
    )  # fmt: skip
    return transformers.ASTModel(config), transformers.ASTFeatureExtractor(num_mel_bins=32, max_length=64)


def _wav2vec2() -> tuple[transformers.PreTrainedModel, transformers.FeatureExtractionMixin]:
    config = transformers.Wav2Vec2Config(
        vocab_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        conv_dim=(16, 16, 16), conv_stride=(5, 8, 8), conv_kernel=(10, 8, 8), num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2, classifier_proj_size=24, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    return transformers.Wav2Vec2Model(config), transformers.Wav2Vec2FeatureExtractor(return_attention_mask=True)
