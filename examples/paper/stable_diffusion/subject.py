"""Subject-driven generation (DreamBooth) with Stable Diffusion 1.5, as in the HRA paper, for one subject.

    python examples/paper/stable_diffusion/subject.py path/to/photos --class-word dog --output runs/dog

The folder has a few photos of the subject. It is called "sks" before the name of its class; the model's own pictures
of the class, made first and kept in the output folder, preserve the prior at weight 1. After training the folder has
the adapter, an export that diffusers loads, where the method is low-rank, and pictures for prompts. The benchmark of
the paper is 30 subjects with 25 prompts each, for which this runs once a subject. Needs a GPU (batches of one photo
and one picture of the class), diffusers and Pillow, and the model on the disk or from the hub. Not run by us with the
real weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from parts import ATTENTION, Parts, arguments_of, image_files, open_images, settings_for, shuffled, train
from rich.progress import track
from torch import Tensor

import isotune

IDENTIFIER = "sks"
PROMPTS = (
    "in the jungle",
    "in the snow",
    "on the beach",
    "on top of a wooden floor",
    "with a city in the background",
)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = arguments_of(__doc__, "rank, which is 7 in the paper, or size of a block")
    parser.add_argument("photos", type=Path, help="folder with a few photos of the subject")
    parser.add_argument("--class-word", required=True, help="what it is, such as dog")
    parser.add_argument("--penalty", type=float, default=0.0, help="HRA's lambda; the paper has 0 and 1e-3")
    parser.add_argument("--rate", type=float, default=5.4e-5, help="HRA's, as far a step as the authors' 1e-4")
    parser.add_argument("--steps", type=int, default=2005)
    parser.add_argument("--prior-images", type=int, default=200, help="0: do without prior preservation")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help='what follows "a sks dog"')
    return parser.parse_args()


def make(parts: Parts, prompt: str, number: int, steps: int, folder: Path, seed: int) -> list[Path]:
    """Pictures for a prompt, each from a seed of its own; those that are in the folder are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:03}.png" for index in range(number)]
    for index, file in track([*enumerate(files)], f"{prompt[:40]}", disable=all(file.exists() for file in files)):
        if not file.exists():
            draw = torch.Generator().manual_seed(seed + index)
            parts.pipe(prompt, num_inference_steps=steps, generator=draw).images[0].save(file)
    return files


def learn(parts: Parts, asked: argparse.Namespace, prior: list[Path]) -> None:
    """A photo and, where there are any, a picture of the class in every step."""
    photos = open_images(image_files(asked.photos), parts.size)
    named = f"a photo of {IDENTIFIER} {asked.class_word}", f"a photo of {asked.class_word}"
    texts = parts.texts(named if prior else named[:1])
    rows, prior_rows = (shuffled(n, 1, asked.seed) for n in (len(photos), len(prior)))

    def loss() -> Tensor:
        images = [photos[next(rows)]]
        if prior:
            images.append(open_images([prior[i] for i in next(prior_rows)], parts.size))
        # Of two halves of equal size the mean is half the sum, and Adam does not see the factor.
        return parts.loss(parts.latents(torch.cat(images)), texts)

    train(parts.unet, loss, asked.steps, asked.rate)


def main() -> None:
    """Pictures of the class, training, the adapter in two layouts, pictures of the subject."""
    asked = arguments()
    torch.manual_seed(asked.seed)
    parts, made = Parts(asked.model, asked.device), asked.output / "pictures"
    class_prompt = f"a photo of {asked.class_word}"
    prior = make(parts, class_prompt, asked.prior_images, asked.sampling_steps, asked.output / "prior", asked.seed)
    penalty = {"penalty": asked.penalty} if asked.method == "hra" else {}
    settings = settings_for(asked.method, asked.size, **penalty)
    isotune.adapt(parts.unet, settings, ATTENTION, seed=asked.seed)
    print(
        f"{sum(row.trainable for row in isotune.describe(parts.unet)):,} numbers train, at a rate of {asked.rate:g}"
    )
    learn(parts, asked, prior)
    isotune.save(parts.unet, asked.output / "adapter")
    try:
        isotune.export_lora(parts.unet, asked.output / "lora")
    except isotune.IsotuneError as error:  # not every method is a LoRA
        print(error)
    for place, ending in enumerate(asked.prompts):
        prompt = f"a {IDENTIFIER} {asked.class_word} {ending}"
        make(parts, prompt, 4, asked.sampling_steps, made / f"{place:02}", asked.seed)


if __name__ == "__main__":
    main()
