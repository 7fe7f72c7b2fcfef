"""The paper's experiments with diffusion models: the scripts run, in miniature, and measure what they say."""

from __future__ import annotations

import json
import runpy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import isotune
from examples import ROOT

PAPER = ROOT / "examples" / "paper"
DIGITS, STABLE = PAPER / "digits", PAPER / "stable_diffusion"


@contextmanager
def on_path(folder: Path) -> Iterator[None]:
    """The scripts of a folder import each other by their bare names, which are gone afterwards."""
    names = [file.stem for file in folder.glob("[!_]*.py")]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        try:
            yield
        finally:
            for name in names:
                sys.modules.pop(name, None)


def run(script: Path, *arguments: object) -> None:
    """Run it as the shell would."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, on_path(script if script.is_dir() else script.parent):
        patch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
    torch.set_num_threads(threads)


@pytest.fixture
def digits() -> Iterator[ModuleType]:
    """A module with the names of all files of the example on digits."""
    pytest.importorskip("sklearn")
    found = ModuleType("digits")
    with on_path(DIGITS):
        for name in ("unet", "looks", "diffusion", "subject", "condition", "tables"):
            vars(found)[name] = __import__(name)
        yield found


def test_both_experiments_on_digits_run_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    run(DIGITS, "--quick", "--output", tmp_path, "--methods", "hra", "ortha")
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {key.split("/")[0] + " " + key.split("/")[1] for key in rows} == {
        "subject base", "subject hra", "subject ortha", "two hra", "two ortha",
        "condition base", "condition outline layer alone", "condition hra",
    }  # fmt: skip
    # Rank 4; at two levels 8 projections with 32 inputs, at two others 6 with 64 and 2 with the 32 of the words.
    numbers = 4 * 2 * (8 * 32 + 6 * 64 + 2 * 32)
    assert {row["numbers"] for key, row in rows.items() if key.startswith("subject/hra")} == {numbers}
    assert all(0 <= row["subject"] <= 1 for key, row in rows.items() if key.startswith("subject"))
    pages = [(tmp_path / f"{name}.png").stat().st_size for name in ("subject", "condition")]
    assert all(1_000 < size < 200_000 for size in pages)
    written = (tmp_path / "results.json").read_bytes()
    run(DIGITS, "--quick", "--output", tmp_path, "--methods", "hra", "ortha")
    again = capsys.readouterr().out
    assert (tmp_path / "results.json").read_bytes() == written
    assert again.split("\n\n")[-1] == first.split("\n\n")[-1]
    assert "subject/hra" not in again


def test_an_adapter_and_an_outline_layer_leave_the_base_as_it_is_at_the_start(digits: ModuleType) -> None:
    torch.manual_seed(0)
    model, x, t = digits.unet.UNet().eval(), torch.randn(3, 1, 8, 8), torch.rand(3)
    prompt = digits.looks.prompts([3, 1, 4])
    with torch.no_grad():
        before = model(x, t, prompt)
        model.conv_in = digits.unet.OutlineInput(model.conv_in)
        isotune.adapt(
            model, isotune.HRA(rank=4), digits.unet.ATTENTION_AND_MLP, train_also=["conv_in.outline"], seed=0
        )
        after = model(torch.cat([x, torch.ones_like(x)], 1), t, prompt)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(isotune.describe(model)) == 4 * (8 + 2) + 1


def test_sampling_finds_the_picture_that_a_perfect_model_knows(digits: ModuleType) -> None:
    picture = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Perfect(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
            known, rest = digits.diffusion.parts(t)
            return (x - known * picture) / rest

    prompt = digits.looks.prompts([3, 3])
    made = digits.diffusion.sample(Perfect(), prompt, seed=0, steps=5)
    torch.testing.assert_close(made, picture.expand(2, 1, 8, 8), rtol=0, atol=1e-3)
    loss = digits.diffusion.denoising_loss(Perfect(), picture.repeat(2, 1, 1, 1), prompt, torch.Generator())
    assert float(loss) < 1e-6


def test_an_outline_is_what_is_beside_a_stroke(digits: ModuleType) -> None:
    x = torch.full((1, 1, 8, 8), -1.0)
    x[0, 0, 3, 3:5] = 1
    found = digits.looks.outlines(x)[0, 0].nonzero().tolist()
    assert found == [[2, 3], [2, 4], [3, 2], [3, 5], [4, 3], [4, 4]]
    ours = digits.looks.outlines(x)
    moved = ours.roll(1, -1)
    assert digits.condition.overlap(ours, ours) == 1
    assert digits.condition.overlap(ours, moved) == pytest.approx(2 / 10)
    assert digits.condition.overlap(ours, torch.zeros_like(ours)) == 0


def test_diversity_is_the_root_mean_square_difference(digits: ModuleType) -> None:
    black, white = -torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)
    assert digits.subject.diversity(torch.cat([black, black])) == 0
    assert digits.subject.diversity(torch.cat([black, white])) == pytest.approx(1)


def test_the_table_has_means_with_intervals_and_differences_by_seed(digits: ModuleType) -> None:
    scores = {"hra": (0.5, 0.6, 0.7), "lora": (0.3, 0.4, 0.5)}
    rows = {
        f"two/{method}/x1/{seed}": {"multiple": 1.0, "iou": value}
        for method, values in scores.items()
        for seed, value in enumerate((0.0, *values))
    }
    groups = digits.tables.grouped(rows, "two")
    assert [sorted(group) for group in groups.values()] == [[1, 2, 3]] * 2
    assert "| hra | x 1 |  | 60 ± 25 |" in digits.tables.table(groups, {"iou": "IoU, %"})
    assert "| lora | **20 ± 0** |" in digits.tables.differences(groups, {"iou": "IoU, %"}, "hra")


def tiny_pipeline(folder: Path) -> Path:
    """Stable Diffusion's parts, drawn at random and small."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = {word: place for place, word in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    text = CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4,
        block_out_channels=(8, 8), norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    StableDiffusionPipeline(
        vae, CLIPTextModel(text), CLIPTokenizer(words, [], model_max_length=16),
        unet, DDIMScheduler(), None, None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def photos(folder: Path, number: int) -> Path:
    from PIL import Image

    folder.mkdir()
    for index in range(number):
        Image.new("RGB", (20, 16), (80 * index, 40, 200)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("diffusers")
    with others_may_warn():
        return tiny_pipeline(tmp_path_factory.mktemp("pipeline") / "parts")


@contextmanager
def others_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        for library in ("diffusers", "transformers"):
            warnings.filterwarnings("ignore", module=library)
        yield


def opened(pipeline: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(pipeline / "unet")


def test_a_subject_is_learned_with_its_prior(pipeline: Path, tmp_path: Path) -> None:
    output, brief = tmp_path / "dog", ("--steps", 2, "--prior-images", 2, "--sampling-steps", 2)
    with others_may_warn():
        run(
            STABLE / "subject.py", photos(tmp_path / "photos", 3), "--class-word", "dog", "--output", output,
            "--model", pipeline, "--device", "cpu", "--prompts", "in the snow", *brief,
        )  # fmt: skip
        assert len(list((output / "prior").glob("*.png"))) == 2
        assert len(list((output / "pictures/00").glob("*.png"))) == 4
        unet = isotune.load(opened(pipeline), output / "adapter")
        rows = isotune.describe(unet)
        assert {row.method for row in rows} == {"hra"}
        assert all(".attn" in row.site and ".ff." not in row.site for row in rows)
        changed = [m.isotune["default"].U for m in unet.modules() if hasattr(m, "isotune")]
        assert any(not torch.equal(U[:, 0], U[:, 1]) for U in changed)
        opened(pipeline).load_lora_adapter(
            output / "lora", prefix="base_model.model", weight_name="adapter_model.safetensors"
        )


def test_a_condition_is_learned_by_an_encoder_and_an_adapter(pipeline: Path, tmp_path: Path) -> None:
    data, output = photos(tmp_path / "data", 2), tmp_path / "edges"
    lines = [{"image": f"{i}.png", "condition": f"{1 - i}.png", "text": "a dog"} for i in range(2)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with others_may_warn():
        run(
            STABLE / "condition.py", data, "--output", output, "--model", pipeline, "--device", "cpu",
            "--steps", 2, "--batch", 2, "--made", 1, "--sampling-steps", 2,
        )  # fmt: skip
        assert [file.name for file in sorted(output.glob("*.png"))] == ["000.png"]
        with on_path(STABLE):
            unet = opened(pipeline)
            unet.conv_in = __import__("condition").ConditionedInput(unet.conv_in, 2)
        isotune.load(unet, output / "adapter")
    assert {row.method for row in isotune.describe(unet)} == {"hra", "full"}
    assert any(".ff.net.0.proj" in row.site for row in isotune.describe(unet))
    encoder = unet.conv_in.condition.isotune["default"]
    assert bool(encoder[-1].weight.ne(0).any())
