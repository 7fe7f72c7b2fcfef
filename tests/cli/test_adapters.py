"""`isotune inspect` and `export`, on adapters made in Python and by `isotune train`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import isotune

Command = Callable[..., int]


def causal(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 12)[None]).logits


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Callable[..., tuple[Path, torch.Tensor]]:
    """Save an adapter that changes the tiny Llama; returns its folder and the adapted model's logits."""

    def make(settings: isotune.Settings) -> tuple[Path, torch.Tensor]:
        model = isotune.adapt(causal(llama), settings, "all-linear", seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn(parameter.shape)
        return isotune.save(model, tmp_path / "adapter"), logits(model)

    return make


def test_inspect_measures_the_rotation_and_the_change(
    command: Command, adapter: Callable[..., tuple[Path, torch.Tensor]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = adapter(isotune.HRA(rank=4))
    assert command("inspect", folder, "--json") == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    assert all(row["orthogonality_error"] < 1e-5 for row in rows)
    assert all(row["change_rank"] == 4 for row in rows)
    assert all(0 < row["change_norm"] < 2 for row in rows)
    assert command("inspect", folder) == 0
    assert "rank of W' - W" in capsys.readouterr().out


def test_inspect_without_the_base_leaves_out_what_needs_it(
    command: Command, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = isotune.adapt(causal(llama), isotune.HRA(rank=2), "query-value")
    isotune.save(model, tmp_path / "adapter", base_model="no/such-base")
    assert command("inspect", tmp_path / "adapter", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["sites"]
    assert [row["change_rank"] for row in rows] == [None] * len(rows)
    assert all(row["orthogonality_error"] < 1e-5 for row in rows)


def test_an_exported_lora_gives_the_same_logits_through_peft(
    command: Command,
    adapter: Callable[..., tuple[Path, torch.Tensor]],
    llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, expected = adapter(isotune.HRA(rank=4))
    assert (
        command("export", folder, "--to", "lora", "--output", tmp_path / "lora", "--rank-multiple", "8", "--json")
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["rank"] == 8
    assert found["residual"] < 1e-5
    model = peft.PeftModel.from_pretrained(causal(llama), str(tmp_path / "lora"))
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_export_is_the_base_with_other_weights(
    command: Command, adapter: Callable[..., tuple[Path, torch.Tensor]], tmp_path: Path
) -> None:
    folder, expected = adapter(isotune.HRA(rank=4))
    assert command("export", folder, "--to", "merged", "--output", tmp_path / "merged") == 0
    torch.testing.assert_close(logits(causal(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").vocab_size > 0


def test_a_merged_export_never_replaces_a_folder(
    command: Command,
    adapter: Callable[..., tuple[Path, torch.Tensor]],
    llama: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = adapter(isotune.HRA(rank=4))
    before = (llama / "model.safetensors").read_bytes()
    assert command("export", folder, "--to", "merged", "--output", llama) == 2
    assert "name a new folder" in capsys.readouterr().err
    assert (llama / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("settings", [isotune.HRA(rank=3, start="anchored"), isotune.HRA(rank=2, strict=True)])
def test_an_anchored_adapter_in_pefts_own_layout_is_plain_hra_of_twice_the_rank(
    command: Command,
    adapter: Callable[..., tuple[Path, torch.Tensor]],
    settings: isotune.HRA,
    llama: Path,
    tmp_path: Path,
) -> None:
    folder, expected = adapter(settings)
    assert command("export", folder, "--to", "peft", "--output", tmp_path / "peft") == 0
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "peft/adapter_model.safetensors")} == {"hra_u"}
    loaded = isotune.load(causal(llama), tmp_path / "peft")
    assert next(iter(loaded.model.layers[0].self_attn.q_proj.isotune.settings.values())).rank == 2 * settings.rank
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--to", "gguf"], "choose lora, diffusers, merged or peft"),
        (["--to", "lora", "--dtype", "int4"], "choose from float32, float16, bfloat16"),
        (["--to", "lora", "--rank-multiple", "0"], "at least 1"),
        (["--to", "lora", "--base", "./no-such-base"], "no model folder at ./no-such-base"),
        (["--to", "peft"], "rotates the input side only"),
    ],
)
def test_what_cannot_be_exported_is_one_message_and_nothing_is_written(
    command: Command,
    adapter: Callable[..., tuple[Path, torch.Tensor]],
    arguments: list[str],
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, _ = adapter(isotune.HRA(rank=2, side="out"))
    assert command("export", folder, "--output", tmp_path / "out", *arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["inspect", "export"])
def test_a_folder_that_is_no_adapter_is_one_message(
    command: Command, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--to", "lora", "--output", tmp_path / "out"] if name == "export" else []
    assert command(name, tmp_path / "nothing", *more) == 2
    assert "there is no adapter folder" in capsys.readouterr().err
