"""The HRA paper's two experiments with diffusion models, small: a subject, and a condition, on digits of 8 x 8.

    python examples/paper/digits                      both, with three seeds (half an hour of one core)
    python examples/paper/digits --only subject --methods hra lora
    python examples/paper/digits --quick              a few steps of everything, to see that it runs

The base model is a U-Net with cross attention to the words of a prompt, trained here on the 1,797 digits that
scikit-learn ships, as a denoising diffusion model. *Subject*: ten pictures of a three that lies on its side, under an
identifier, as DreamBooth does, with and without preserving the prior; then a seven in half the ink by an adapter of
its own, and both adapters at once. *Condition*: pictures that follow a given outline. Of `--rates` times its usual
rate each method takes the best, by a seed of its own. What is in the output folder is not done again.

Needs scikit-learn and Pillow: pip install scikit-learn pillow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import condition
import reporting
import subject
import torch
from base import open_base
from contenders import FULL, SIZES, Asked, Results


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        "digits", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs/digits"),
        help="folder, one for each set of options",
    )
    parser.add_argument("--only", nargs="+", choices=("subject", "condition"), default=("subject", "condition"))
    parser.add_argument("--methods", nargs="+", choices=(*SIZES, FULL), default=(*SIZES, FULL), metavar="METHOD")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=(1.0, 3.0, 10.0, 30.0), help="multiples of the usual rate"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of each training")
    parser.add_argument("--base-steps", type=int, default=2400, help="batches of the base model")
    parser.add_argument("--judge-steps", type=int, default=1000, help="batches of the classifier of pictures")
    parser.add_argument("--samples", type=int, default=48, help="pictures of the subject to measure")
    parser.add_argument("--quick", action="store_true", help="1 step, 1 seed, 1 rate, 4 pictures: nothing is learned")
    asked = parser.parse_args()
    if asked.quick:
        brief = {"rates": (1.0,), "seeds": 1, "steps": 1, "base_steps": 1, "judge_steps": 1, "samples": 4}
        vars(asked).update(brief)
    return asked


def main() -> None:
    """Open or train the base, run what is asked for, print tables and write pages of pictures."""
    given = arguments()
    torch.set_num_threads(1)
    asked = Asked(
        tuple(given.methods), tuple(given.rates), given.seeds, given.steps, given.samples, 2 if given.quick else 12
    )
    results = Results(given.output)
    base = open_base(given.output, given.base_steps, given.judge_steps)
    for name, experiment in (("subject", subject), ("condition", condition)):
        if name in given.only:
            experiment.run(base, asked, results)
            print(f"\n{reporting.text(name, base, results)}\n")
            reporting.draw(name, base, asked, results, given.output / f"{name}.png")


if __name__ == "__main__":
    main()
