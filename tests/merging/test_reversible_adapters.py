"""Adapters in folders, compressed into one folder, and recovered as LoRAs by their names."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import isotune
from isotune import HRA, LoRA
from isotune.checkpoint.files import CONFIG
from isotune.checkpoint.read import read_stored
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError
from isotune.merging.reversible.adapters import compress_adapters, recover_adapter
from isotune.merging.reversible.stored import Reversible
from laws.case import registered
from laws.test_toy_method import Gain
from support import DATA, adapted, assert_same_output, files, minilm, output, resnet20, stories

STORIES = DATA / "stories260k"


def saved(
    tmp_path: Path, name: str, method: Any, targets: Any = "attention", make: Any = stories, **options: Any
) -> Any:
    """A model with an adapter, saved under that name."""
    model = adapted(make(), method, targets, **options)
    isotune.save(model, tmp_path / name, base_model="some/base")
    return model


def three(tmp_path: Path) -> tuple[dict[str, nn.Module], list[Path]]:
    """Adapters of different ranks, scalings and layers, one with a module trained in full."""
    models = {
        "one": saved(tmp_path, "one", LoRA(rank=4, alpha=6)),
        "two": saved(tmp_path, "two", LoRA(rank=2, rslora=True), "all-linear", seed=1),
        "three": saved(tmp_path, "three", LoRA(rank=4), ["q_proj"], seed=2, train_also=["norm"]),
    }
    return models, [tmp_path / name for name in models]


def recovered(folder: Path, name: str, output: Path, make: Any = stories) -> Any:
    return isotune.load(make(), recover_adapter(folder, name, output)).eval()


def test_adapters_that_cannot_share_come_back_exactly(tmp_path: Path) -> None:
    models, folders = three(tmp_path)
    found = compress_adapters(folders, tmp_path / "all")
    assert found.errors == {"one": 0, "two": 0, "three": 0}  # three models are too few for two basis models
    for name, model in models.items():
        loaded = recovered(tmp_path / "all", name, tmp_path / f"{name} again")
        assert_same_output(output(loaded), output(model))
        again = read_stored(tmp_path / f"{name} again")
        assert set(again.settings) == set(read_stored(tmp_path / name).settings)


def test_outputs_of_every_layer_differ_by_the_error_that_is_told(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(8)]
    models = {name: alike(tmp_path, name, seed) for seed, name in enumerate(names)}
    base = stories()
    found = compress_adapters([tmp_path / name for name in names], tmp_path / "all", basis=2)
    assert found.values < found.separate_values
    assert 1e-3 < max(found.errors.values()) < 0.2
    errors = Reversible.load(tmp_path / "all").errors
    assert found.errors == {name: max(error.change for error in sites.values()) for name, sites in errors.items()}
    for name, model in models.items():
        loaded = recovered(tmp_path / "all", name, tmp_path / "out")
        for path, error in errors[name].items():
            x = torch.randn(500, 64)
            plain, before, after = (m.get_submodule(path)(x).detach() for m in (base, model, loaded))
            assert float((after - before).norm() / (before - plain).norm()) == pytest.approx(error.change, rel=0.1)


def test_a_tight_tolerance_leaves_the_outputs_as_they_were(tmp_path: Path) -> None:
    names = [f"m{i}" for i in range(4)]
    models = {name: alike(tmp_path, name, seed) for seed, name in enumerate(names)}
    found = compress_adapters([tmp_path / name for name in names], tmp_path / "all", tolerance=1e-6)
    assert max(found.errors.values()) <= 1e-6
    for name, model in models.items():
        assert_same_output(output(recovered(tmp_path / "all", name, tmp_path / "out")), output(model))


def alike(tmp_path: Path, name: str, seed: int) -> nn.Module:
    """Adapters that have most in common, as those trained from one that is there already."""
    model = adapted(stories(), LoRA(rank=4), "attention", size=0.2)
    with torch.no_grad():
        noise = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=noise))
    isotune.save(model, tmp_path / name)
    return model


def test_a_recovered_adapter_is_a_plain_lora_that_peft_loads(tmp_path: Path) -> None:
    models, folders = three(tmp_path)
    assert not any(compress_adapters(folders, tmp_path / "exact").errors.values())
    for name, rank in (("one", 4), ("two", 2)):
        out = recover_adapter(tmp_path / "exact", name, tmp_path / "out")
        config = json.loads((out / CONFIG).read_text())
        assert config["peft_type"] == "LORA"
        assert config["r"] == config["lora_alpha"] == rank
        assert config["base_model_name_or_path"] == "some/base"
        assert not any(config[key] for key in ("rank_pattern", "alpha_pattern", "use_rslora", "modules_to_save"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded: Any = peft.PeftModel.from_pretrained(stories(), out).eval()
        assert_same_output(output(loaded), output(models[name]))


def test_modules_trained_in_full_come_back_bit_for_bit(tmp_path: Path) -> None:
    models = {
        name: saved(tmp_path, name, LoRA(rank=2), ["query"], minilm, seed=seed, train_also=["pooler"])
        for seed, name in enumerate(("one", "two"))
    }
    isotune.save(adapted(minilm(), LoRA(rank=2), ["query"], seed=3), tmp_path / "none")
    compress_adapters([*(tmp_path / name for name in models), tmp_path / "none"], tmp_path / "all", basis=1)
    for name in models:
        before = read_stored(tmp_path / name).trained
        after = read_stored(recover_adapter(tmp_path / "all", name, tmp_path / "out")).trained
        assert before.keys() == after.keys() == {"pooler"}
        assert before["pooler"].keys() == after["pooler"].keys()
        assert all(before["pooler"][key].equal(after["pooler"][key]) for key in before["pooler"])
    assert read_stored(recover_adapter(tmp_path / "all", "none", tmp_path / "out")).trained == {}


class Kinds(nn.Module):
    """A layer of each kind, and matrices of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(11, 6)
        self.conv1d = Conv1D(5, 6)
        self.conv2d = nn.Conv2d(2, 4, 3, padding=1)
        self.grouped = nn.Conv2d(4, 8, 3, groups=2)
        self.experts = nn.Module()
        self.experts.up = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, ids: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.conv1d(self.embedding(ids)), self.grouped(self.conv2d(images)), self.experts.up * 1


@pytest.mark.parametrize("targets", [["embedding"], ["conv1d"], ["conv2d"], ["grouped"], ["experts.up"]], ids=str)
def test_every_kind_of_layer_keeps_its_layout(targets: list[str], tmp_path: Path) -> None:
    torch.manual_seed(1)
    base = Kinds().state_dict()

    def make() -> Kinds:
        model = Kinds()
        model.load_state_dict(base)
        return model

    inputs = torch.tensor([[1, 2, 3]]), torch.randn(2, 2, 5, 5)
    models = {name: saved(tmp_path, name, LoRA(rank=2), targets, make, seed=i) for i, name in enumerate("abcdefgh")}
    found = compress_adapters([tmp_path / name for name in models], tmp_path / "all", tolerance=1e-5)
    assert max(found.errors.values()) <= 1e-5
    for name, model in models.items():
        loaded = recovered(tmp_path / "all", name, tmp_path / "out", make)
        for got, expected in zip(loaded(*inputs), model(*inputs), strict=True):
            assert_same_output(got, expected)
        before, after = read_stored(tmp_path / name), read_stored(tmp_path / "out")
        shapes = [{p: {k: t.shape for k, t in of.items()} for p, of in s.state.items()} for s in (before, after)]
        assert shapes[0] == shapes[1]


def test_a_resnet_comes_back(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 32, 32)
    models = {
        name: saved(tmp_path, name, LoRA(rank=3), r"layer2\..*conv\d", resnet20, seed=i, size=0.02)
        for i, name in enumerate(("one", "two"))
    }
    compress_adapters([tmp_path / name for name in models], tmp_path / "all", tolerance=0.01)
    for name, model in models.items():
        loaded = recovered(tmp_path / "all", name, tmp_path / "out", resnet20)
        assert_same_output(output(loaded, x=images), output(model, x=images))


def test_rotations_come_back_as_loras_where_the_base_is_given(tmp_path: Path) -> None:
    model = saved(tmp_path, "hra", HRA(rank=4))
    saved(tmp_path, "lora", LoRA(rank=2))
    both = [tmp_path / "hra", tmp_path / "lora"]
    with pytest.raises(
        CheckpointError, match=r"the change that hra makes depends on the base's weights; name the base"
    ):
        compress_adapters(both, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    compress_adapters(both, tmp_path / "all", base=STORIES)
    assert_same_output(output(recovered(tmp_path / "all", "hra", tmp_path / "out")), output(model))


def test_adapters_written_by_peft_are_taken(tmp_path: Path) -> None:
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.get_peft_model(stories(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"]))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        model.eval().save_pretrained(tmp_path / "peft")
    compress_adapters([tmp_path / "peft"], tmp_path / "all")
    assert_same_output(output(recovered(tmp_path / "all", "peft", tmp_path / "out")), output(model))


def test_an_adapter_is_bound_to_its_base_as_before(tmp_path: Path) -> None:
    saved(tmp_path, "one", LoRA(rank=2), ["q_proj"])
    compress_adapters([tmp_path / "one"], tmp_path / "all")
    out = recover_adapter(tmp_path / "all", "one", tmp_path / "out")
    with pytest.raises(CheckpointError, match="made for another base"):
        isotune.load(minilm(), out)
    headers = [read_stored(folder).header or {} for folder in (tmp_path / "one", out)]
    assert headers[0]["base_config"] == headers[1]["base_config"] != ""


def test_the_folder_is_also_a_reversible_one(tmp_path: Path) -> None:
    _, folders = three(tmp_path)
    found = compress_adapters(folders, tmp_path / "all", names=["x", "y", "z"], basis=1)
    loaded = Reversible.load(tmp_path / "all")
    assert loaded.names == ("x", "y", "z")
    assert (loaded.values, loaded.separate_values) == (found.values, found.separate_values)
    before = files(tmp_path / "all")
    compress_adapters(folders, tmp_path / "all", names=["x", "y", "z"], basis=1)
    assert files(tmp_path / "all") == before


def test_folders_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        saved(tmp_path / folder, "last", LoRA(rank=2), ["q_proj"])
    found = compress_adapters([tmp_path / "x" / "last", tmp_path / "y" / "last"], tmp_path / "all")
    assert list(found.models) == ["x/last", "y/last"]
    recover_adapter(tmp_path / "all", "x/last", tmp_path / "out")


def test_what_evaluation_needs_comes_back(tmp_path: Path) -> None:
    for name in ("one", "two"):
        saved(tmp_path, name, LoRA(rank=2), ["q_proj"])
    (tmp_path / "one" / "task.json").write_text('{"task": "classification"}')
    compress_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "all")
    out = recover_adapter(tmp_path / "all", "one", tmp_path / "one again")
    assert (out / "task.json").read_text() == '{"task": "classification"}'
    assert not (recover_adapter(tmp_path / "all", "two", tmp_path / "two again") / "task.json").exists()


def test_all_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    saved(tmp_path, "one", LoRA(rank=2), ["q_proj"])
    with pytest.raises(CheckpointError, match=r"(?s)no adapter folder .*missing.*no adapter folder .*gone"):
        compress_adapters([tmp_path / "missing", tmp_path / "one", tmp_path / "gone"], tmp_path / "all")


def test_unusable_names_are_refused(tmp_path: Path) -> None:
    _, folders = three(tmp_path)
    with pytest.raises(OptionError, match="the names x, x, y are not all different; give each"):
        compress_adapters(folders, tmp_path / "all", names=["x", "x", "y"])
    with pytest.raises(OptionError, match="2 names were given for 3 models"):
        compress_adapters(folders, tmp_path / "all", names=["x", "y"])
    with pytest.raises(OptionError, match="nothing to merge"):
        compress_adapters([], tmp_path / "all")
    with pytest.raises(OptionError, match="cannot both be asked for"):
        compress_adapters(folders, tmp_path / "all", basis=2, tolerance=0.1)
    compress_adapters(folders, tmp_path / "all")
    with pytest.raises(OptionError, match=r"no model 'tow'\. Did you mean 'two'\?"):
        recover_adapter(tmp_path / "all", "tow", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_other_layers_under_one_name_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "one", LoRA(rank=2), ["0"], lambda: nn.Sequential(nn.Linear(4, 6)))
    saved(tmp_path, "two", LoRA(rank=2), ["0"], lambda: nn.Sequential(nn.Linear(5, 6)))
    with pytest.raises(CheckpointError, match=r"'0' is 6 x 4 \(linear\) in one, 6 x 5 \(linear\) in two"):
        compress_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "all")


def test_a_method_without_a_low_rank_form_is_refused(tmp_path: Path) -> None:
    with registered(Gain):
        saved(tmp_path, "gain", Gain(), ["v_proj"])
        with pytest.raises(
            NoLowRankFormError, match="gain has no exact low-rank form, so that it cannot be compressed"
        ):
            compress_adapters([tmp_path / "gain"], tmp_path / "all", base=STORIES)


def test_folders_of_something_else_stay(tmp_path: Path) -> None:
    _, folders = three(tmp_path)
    with pytest.raises(CheckpointError, match="holds something else"):
        compress_adapters(folders, tmp_path)
    compress_adapters(folders, tmp_path / "all")
    with pytest.raises(CheckpointError, match="holds something else"):
        recover_adapter(tmp_path / "all", "one", tmp_path / "all")
    with pytest.raises(CheckpointError, match=r"holds no reversible\.json"):
        recover_adapter(tmp_path / "one", "one", tmp_path / "out")


@pytest.mark.parametrize(
    "file", ["adapters.json", "adapters.safetensors", "reversible.json", "reversible.safetensors"]
)
def test_damaged_folders_are_refused(file: str, tmp_path: Path) -> None:
    _, folders = three(tmp_path)
    compress_adapters(folders, tmp_path / "all")
    path = tmp_path / "all" / file
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    with pytest.raises(CheckpointError, match=file.partition(".")[0]):
        recover_adapter(tmp_path / "all", "three", tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=file.partition(".")[0]):
        recover_adapter(tmp_path / "all", "three", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_of_two_compressions_are_told_apart(tmp_path: Path) -> None:
    _, folders = three(tmp_path)
    compress_adapters(folders, tmp_path / "all")
    compress_adapters(folders[:2], tmp_path / "fewer")
    for name in ("adapters.json", "adapters.safetensors"):
        (tmp_path / "all" / name).write_bytes((tmp_path / "fewer" / name).read_bytes())
    with pytest.raises(CheckpointError, match="do not belong together"):
        recover_adapter(tmp_path / "all", "one", tmp_path / "out")
