"""Folders of adapters merged into one folder, against the dense arithmetic on folded models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import models
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import isotune
from isotune import HRA, LoRA, Settings
from isotune.adapters.low_rank.dora import DoRA
from isotune.adapters.low_rank.hydra import Hydra
from isotune.adapters.low_rank.ia3 import IA3
from isotune.adapters.orthogonal.ether import ETHER
from isotune.adapters.orthogonal.oft import OFT
from isotune.checkpoint.files import CONFIG, TENSORS
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.save import write_parts
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.folders import MERGE, TASK
from isotune.merging.adapters.merge import merge
from isotune.merging.record import MergedAdapter
from isotune.merging.registry import rule
from peers import peft_adapt, peft_load
from support import adapted, assert_same_output, files, output

Build = Callable[[], Any]
QUERY = "model.layers.0.self_attn.q_proj"


class Kinds(nn.Module):
    """An embedding, a convolution, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.tokens, self.images, self.head = nn.Embedding(12, 6), nn.Conv2d(3, 8, (2, 3)), nn.Linear(6, 5)

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        hidden = self.head(self.tokens(input_ids))
        return (hidden, self.images(hidden[None, None].expand(1, 3, -1, -1)))


def with_tokens(folder: Path, **ids: int) -> None:
    (folder / "vocab.json").write_text(json.dumps(ids))


def save(model: Any, folder: Path, base: str = "some/base") -> Path:
    return isotune.save(model, folder, base_model=base)


def adapter(
    folder: Path, method: Settings, targets: Any = "attention", build: Build = models.llama, **options: Any
) -> Path:
    """A folder with an adapter that is off its start."""
    return save(adapted(build(), method, targets, **options), folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRAs of different ranks, scales and layers."""
    folder = tmp_path_factory.mktemp("pair")
    return [
        adapter(folder / "one", LoRA(rank=3, alpha=5), "attention"),
        adapter(folder / "two", LoRA(rank=2, rslora=True), ["q_proj", "down_proj"], seed=1),
    ]


def weights_of(folder: Path | None, build: Build = models.llama, by_peft: bool = False) -> dict[str, Tensor]:
    """The weights of the model, with the adapter in the folder folded in."""
    model = build()
    if folder is not None:
        model = peft_load(model, folder).merge_and_unload() if by_peft else isotune.load(model, folder)
        model = model if by_peft else isotune.fold(model, keep_base=False)
    return {name: tensor.double() for name, tensor in model.state_dict().items()}


def assert_weighted_sum(
    out: Path, folders: Sequence[Path], weights: Sequence[float], build: Build = models.llama, by_peft: bool = False
) -> None:
    base, merged = weights_of(None, build), weights_of(out, build)
    changed = 0
    inputs = [weights_of(folder, build, by_peft) for folder in folders]
    for name, W in base.items():
        expected = sum(w * (own[name] - W) for w, own in zip(weights, inputs, strict=True))
        changed += bool(expected.abs().max() > 1e-4)
        torch.testing.assert_close(merged[name] - W, expected, rtol=1e-5, atol=1e-6)
    assert changed


def factors(folder: Path) -> dict[str, Tensor]:
    """The change of every layer of a LoRA folder, dense."""
    stored = read_stored(folder)
    return {
        path: stored.settings[path].scale * state["lora_B.weight"].double() @ state["lora_A.weight"].double()
        for path, state in stored.state.items()
    }


def conv1d(folder: Path, seed: int) -> Path:
    return adapter(folder, LoRA(rank=2 + seed), ["c_attn", "c_proj"], models.gpt2, seed=seed)


def kinds(folder: Path, seed: int) -> Path:
    return adapter(folder, LoRA(rank=2 + seed), ["tokens", "images", "head"], Kinds, seed=seed)


def patterns(folder: Path, seed: int) -> Path:
    overrides = {"q_proj": {"rank": 4, "alpha": 7.0}, "v_proj": {"alpha": 3.0}}
    return adapter(folder, LoRA(rank=2, alpha=1), "attention", seed=seed, overrides=overrides)


def mixed_scales(folder: Path, seed: int) -> Path:
    return adapter(folder, LoRA(rank=2 + seed, alpha=3, rslora=bool(seed)), "all-linear", seed=seed)


def by_peft(folder: Path, seed: int) -> Path:
    config = peft.LoraConfig(
        r=2, lora_alpha=6, use_rslora=bool(seed), target_modules=["q_proj", "down_proj"],
        rank_pattern={"q_proj": 4}, alpha_pattern={"down_proj": 3},
    )  # fmt: skip
    peft_adapt(models.llama(), config, seed).save_pretrained(folder)
    return folder


def by_peft_conv1d(folder: Path, seed: int) -> Path:
    config = peft.LoraConfig(r=2 + seed, lora_alpha=6, target_modules=["c_attn"], fan_in_fan_out=True)
    peft_adapt(models.gpt2(), config, seed).save_pretrained(folder)
    return folder


CASES: dict[str, tuple[Callable[[Path, int], Path], Build]] = {
    "ranks and scales": (mixed_scales, models.llama),
    "patterns": (patterns, models.llama),
    "conv1d": (conv1d, models.gpt2),
    "embedding, convolution, linear": (kinds, Kinds),
    "PEFT's": (by_peft, models.llama),
    "PEFT's conv1d": (by_peft_conv1d, models.gpt2),
}


@pytest.mark.parametrize("case", CASES)
def test_sum_is_the_dense_arithmetic(case: str, tmp_path: Path) -> None:
    make, build = CASES[case]
    folders = [make(tmp_path / f"{seed}", seed) for seed in (0, 1)]
    found = merge(folders, "sum", [0.7, -0.4], tmp_path / "out", progress=False)
    assert_weighted_sum(tmp_path / "out", folders, [0.7, -0.4], build, by_peft=case.startswith("PEFT"))
    assert found.error < 1e-6
    assert set(found.errors) == set(found.ranks) == set(read_stored(tmp_path / "out").settings)


@pytest.mark.parametrize("method", [HRA(rank=2), OFT(block=4), DoRA(rank=2)], ids=lambda m: m.name)
def test_changes_that_depend_on_the_base_are_merged_with_it(
    method: Settings, tmp_path: Path, pair: list[Path]
) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    folders = [adapter(tmp_path / "own", method, "attention", size=0.2), pair[1]]
    merge(folders, "sum", [1.0, 0.5], tmp_path / "out", base=base, progress=False)
    assert_weighted_sum(tmp_path / "out", folders, [1.0, 0.5])
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["peft_type"] == "LORA"


def test_the_base_is_found_where_an_adapters_config_names_its_folder(tmp_path: Path) -> None:
    base = models.save(models.llama(), tmp_path / "base")
    folder = save(adapted(models.llama(), HRA(rank=2), size=0.2), tmp_path / "hra", str(base))
    merge([folder], output=tmp_path / "out", progress=False)
    assert_weighted_sum(tmp_path / "out", [folder], [1.0])


def test_parameters_of_experts_merge_with_their_base(tmp_path: Path) -> None:
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=6, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=2, vocab_size=20, head_dim=4,
    )  # fmt: skip

    def build() -> Any:
        torch.manual_seed(3)
        return transformers.MixtralForCausalLM(config)

    base = tmp_path / "base"
    base.mkdir()
    save_file({name: t.clone() for name, t in build().state_dict().items()}, base / "model.safetensors")
    folders = [adapter(tmp_path / f"{s}", HRA(rank=2), ["experts"], build, seed=s, size=0.2) for s in (0, 1)]
    merge(folders, weights=[0.5, 0.5], output=tmp_path / "out", base=base, progress=False)
    assert_weighted_sum(tmp_path / "out", folders, [0.5, 0.5], build)


def test_one_adapter_with_weight_one_is_itself(tmp_path: Path, pair: list[Path]) -> None:
    merge(pair[:1], output=tmp_path / "out", progress=False)
    before, after = factors(pair[0]), factors(tmp_path / "out")
    assert before.keys() == after.keys()
    for path, change in before.items():
        torch.testing.assert_close(after[path], change, rtol=1e-6, atol=1e-8)
    model, merged = (isotune.load(models.llama(), folder).eval() for folder in (pair[0], tmp_path / "out"))
    assert_same_output(output(merged), output(model), 1e-6)


def test_layers_that_one_adapter_lacks_are_the_others_alone(tmp_path: Path, pair: list[Path]) -> None:
    found = merge(pair, output=tmp_path / "out", progress=False)
    assert_weighted_sum(tmp_path / "out", pair, [1.0, 1.0])
    assert found.ranks[QUERY] == 5
    assert found.ranks[QUERY.replace("q_proj", "o_proj")] == 3
    assert found.ranks["model.layers.1.mlp.down_proj"] == 2
    assert found.notes == [
        "one adapts 8 layers and two 4, 2 of them in common; elsewhere a model counts as unchanged"
    ]


def test_peft_loads_the_result_and_computes_the_same(tmp_path: Path, pair: list[Path]) -> None:
    merge(pair, weights=[1.0, 0.3], output=tmp_path / "out", progress=False)
    ours = isotune.load(models.llama(), tmp_path / "out").eval()
    assert_same_output(output(peft_load(models.llama(), tmp_path / "out")), output(ours))
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["base_model_name_or_path"] == "some/base"
    header = read_stored(tmp_path / "out").header or {}
    assert header["base_config"] == (read_stored(pair[0]).header or {})["base_config"] != ""


def test_a_rank_cuts_to_the_best_approximation_and_tells_the_error(tmp_path: Path, pair: list[Path]) -> None:
    found = merge(pair, output=tmp_path / "out", rank=2, progress=False)
    exact, cut = [factors(merge(pair, output=tmp_path / "exact", progress=False).path), factors(tmp_path / "out")]
    lost = whole = 0.0
    for path, change in exact.items():
        S = torch.linalg.svdvals(change)
        tail, norm = float(S[2:].norm()), float(S.norm())
        assert found.ranks[path] == 2
        assert found.errors[path] == pytest.approx(tail / norm, rel=1e-4, abs=1e-6)
        assert float((cut[path] - change).norm()) == pytest.approx(tail, rel=1e-4, abs=1e-6)
        lost, whole = lost + tail**2, whole + norm**2
    assert found.error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert found.errors["model.layers.1.mlp.down_proj"] < 1e-6  # it has no more than that


def test_rules_on_entries_are_cut_to_the_sum_of_the_ranks(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / f"{s}", LoRA(rank=2), seed=s, size=0.3) for s in (0, 1)]
    ties = rule("ties", density=0.4, trim="tensor")
    found = merge(folders, ties, output=tmp_path / "out", progress=False)
    full = merge(folders, ties, output=tmp_path / "full", rank=16, progress=False)
    assert full.error < 1e-6
    exact, cut = factors(tmp_path / "full"), factors(tmp_path / "out")
    for path, change in exact.items():
        error = float((cut[path] - change).norm() / change.norm())
        assert found.ranks[path] == 4
        assert error == pytest.approx(found.errors[path], rel=1e-3)
        assert error > 0.01
    # At most 40 % of the entries of each of two changes are left.
    assert all((change.abs() > 1e-6).double().mean() <= 0.8 for change in exact.values())


def test_a_sum_that_cancels_is_written_as_nothing(tmp_path: Path, pair: list[Path]) -> None:
    merge([pair[0]] * 2, weights=[1.0, -1.0], names=["a", "b"], output=tmp_path / "out", rank=1, progress=False)
    assert all(change.abs().max() < 1e-6 for change in factors(tmp_path / "out").values())
    merge(pair[:1], weights=[0.0], output=tmp_path / "zero", progress=False)
    assert not any(change.any() for change in factors(tmp_path / "zero").values())


@pytest.mark.parametrize("method", [HRA(rank=2), OFT(block=4)], ids=lambda m: m.name)
@pytest.mark.parametrize("name", ["compose", "karcher"])
def test_rules_on_rotations_write_an_adapter_of_the_method(name: str, method: Settings, tmp_path: Path) -> None:
    """No base is needed: the layers that one of them lacks are the other's (karcher: half of its way)."""
    folders = [
        adapter(tmp_path / "one", method, "attention", size=0.2),
        adapter(tmp_path / "two", method, ["q_proj", "up_proj"], seed=1, size=0.2),
    ]
    found = merge(folders, name, output=tmp_path / "out", progress=False)
    assert read_stored(tmp_path / "out").method == method.name
    assert found.errors == {}
    base, merged, one = weights_of(None), weights_of(tmp_path / "out"), weights_of(folders[0])
    alone = f"{QUERY.replace('q_proj', 'o_proj')}.weight"
    R = torch.linalg.solve(base[alone], merged[alone])
    times = 1 if name == "compose" else 2
    torch.testing.assert_close(base[alone] @ R.matrix_power(times), one[alone], rtol=0, atol=1e-4)
    assert not torch.allclose(base[alone], one[alone], atol=1e-2)
    assert not torch.allclose(merged[f"{QUERY}.weight"], base[f"{QUERY}.weight"], atol=1e-3)


def test_a_mean_takes_layers_that_a_model_lacks_as_unturned_whatever_the_start(tmp_path: Path) -> None:
    method = HRA(rank=2, start="random")
    one = adapter(tmp_path / "one", method, ["q_proj", "o_proj"])
    two = adapter(tmp_path / "two", method, ["q_proj"], seed=1)
    merge([one, two], "karcher", output=tmp_path / "out", progress=False)
    base, merged, turned = weights_of(None), weights_of(tmp_path / "out"), weights_of(one)
    W = f"{QUERY.replace('q_proj', 'o_proj')}.weight"
    R = torch.linalg.solve(base[W], merged[W])
    torch.testing.assert_close(base[W] @ R @ R, turned[W], rtol=0, atol=1e-4)


def test_a_method_that_is_never_the_identity_has_no_mean_with_a_layer_left_alone(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", ETHER(), ["q_proj", "o_proj"])
    two = adapter(tmp_path / "two", ETHER(), ["q_proj"], seed=1)
    with pytest.raises(OptionError, match=r"o_proj': two leaves this layer alone, and ether is never the identity"):
        merge([one, two], "karcher", output=tmp_path / "out", progress=False)


# Modules trained in full.


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters: two with different heads, one with the head of the first."""
    folder, found = tmp_path_factory.mktemp("heads"), []
    for seed, name in enumerate(("one", "two", "like one")):
        model = adapted(models.llama(), LoRA(rank=2), ["q_proj"], seed=seed, train_also=["lm_head"], size=0.01)
        found.append(save(model, folder / name))
        (folder / name / TASK).write_text(json.dumps({"labels": seed % 2}))
    model = isotune.load(models.llama(), found[2])
    model.lm_head.isotune["default"].load_state_dict({"weight": head(found[0])})
    save(model, found[2])
    (found[2] / TASK).write_text((found[0] / TASK).read_text())
    return found


def head(folder: Path) -> Tensor:
    (state,) = read_stored(folder).trained.values()
    return state["weight"]


def test_modules_that_are_the_same_are_kept_and_the_task_with_them(heads: list[Path], tmp_path: Path) -> None:
    found = merge([heads[0], heads[2]], output=tmp_path / "out", progress=False)
    assert found.modules == ["lm_head"]
    assert torch.equal(head(tmp_path / "out"), head(heads[0]))
    assert json.loads((tmp_path / "out" / TASK).read_text()) == {"labels": 0}


def test_modules_that_differ_need_a_word(heads: list[Path], tmp_path: Path) -> None:
    message = (
        r"2 adapters hold the module 'lm_head', trained in full, with different values; say what to do: "
        r"modules=average \(--modules average\), modules=drop, or the name of the adapter whose modules to keep"
    )
    with pytest.raises(CheckpointError, match=message):
        merge(heads[:2], output=tmp_path / "out", progress=False)
    with pytest.raises(OptionError, match="modules='mean' is unknown; say average, drop, or an adapter: one, two"):
        merge(heads[:2], output=tmp_path / "out", modules="mean", progress=False)
    with pytest.raises(OptionError, match="the weights sum to zero, so that there is no average"):
        merge(heads[:2], weights=[1, -1], output=tmp_path / "out", modules="average", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_modules_are_averaged_dropped_or_kept_by_name(heads: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(heads[:2], weights=[3.0, 1.0], output=out, modules="average", progress=False)
    torch.testing.assert_close(head(out), 0.75 * head(heads[0]) + 0.25 * head(heads[1]))
    assert not (out / TASK).exists()
    assert merge(heads[:2], output=out, modules="two", progress=False).modules == ["lm_head"]
    assert torch.equal(head(out), head(heads[1]))
    assert json.loads((out / TASK).read_text()) == {"labels": 1}
    assert merge(heads[:2], output=out, modules="drop", progress=False).modules == []
    assert read_stored(out).trained == {}
    # The older output's task is no longer what this adapter was made for.
    assert not (out / TASK).exists()


def test_an_adapter_that_only_trained_modules_merges_with_others(tmp_path: Path, heads: list[Path]) -> None:
    stored = read_stored(heads[0])
    only = write_parts(tmp_path / "only", {}, stored.trained, stored.base)
    found = merge([only, heads[2]], output=tmp_path / "out", progress=False)
    assert found.modules == ["lm_head"]
    assert set(found.ranks) == set(stored.settings)
    with pytest.raises(CheckpointError, match="none of these adapters adapts a layer"):
        merge([only], output=tmp_path / "out", progress=False)


# The files beside the adapter.


def test_the_report_is_what_merge_returns(tmp_path: Path, pair: list[Path]) -> None:
    found = merge(pair, "ties", [1.0, 0.5], tmp_path / "out", options={"density": 0.5}, progress=False)
    report = json.loads((tmp_path / "out" / MERGE).read_text())
    assert found.path == tmp_path / "out"
    assert report["rule"] == "ties"
    assert report["options"] == rule("ties", density=0.5).model_dump()
    assert report["models"] == {"one": 1.0, "two": 0.5}
    for key in ("ranks", "errors", "error", "modules", "notes", "seconds"):
        assert report[key] == getattr(found, key)
    assert found.seconds > 0


def test_a_merge_is_a_model_that_merges_again(tmp_path: Path, pair: list[Path]) -> None:
    merge(pair, output=tmp_path / "out", progress=False)
    merge([tmp_path / "out", pair[0]], weights=[0.5, -0.5], output=tmp_path / "again", progress=False)
    assert_weighted_sum(tmp_path / "again", [pair[1]], [0.5])


def test_names_are_those_of_the_folders_and_decide_what_is_drawn(tmp_path: Path) -> None:
    for where in ("a", "b"):
        adapter(tmp_path / where / "last", LoRA(rank=2), ["q_proj"], seed=ord(where))
    folders = [tmp_path / where / "last" for where in ("a", "b")]

    def drawn(given: list[Path], seed: int = 0, **options: Any) -> tuple[MergedAdapter, Tensor]:
        found = merge(given, "dare", output=tmp_path / "out", seed=seed, progress=False, **options)
        return found, factors(tmp_path / "out")[QUERY]

    found, first = drawn(folders)
    assert list(found.models) == ["a/last", "b/last"]
    torch.testing.assert_close(drawn(folders[::-1])[1], first)
    torch.testing.assert_close(drawn(folders[::-1], names=["b/last", "a/last"])[1], first)
    assert not torch.allclose(drawn(folders, names=["x", "y"])[1], first)
    assert not torch.allclose(drawn(folders, seed=1)[1], first)


# What cannot be merged: one message, and nothing is written.


def truncated_file(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    folder = adapter(tmp / "cut", LoRA(rank=2), ["q_proj"])
    (folder / TENSORS).write_bytes((folder / TENSORS).read_bytes()[:200])
    return {"adapters": [pair[0], folder]}


def with_nan(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    folder = by_peft(tmp / "nan", 0)
    tensors = load_file(folder / TENSORS)
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return {"adapters": [pair[0], folder]}


def other_base(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    return {
        "adapters": [pair[0], adapter(tmp / "wide", LoRA(rank=2), ["q_proj"], lambda: models.llama(vocab_size=50))]
    }


def other_base_name(tmp: Path, _: list[Path]) -> dict[str, Any]:
    folders = [by_peft(tmp / "a", 0), by_peft(tmp / "b", 1)]
    config = json.loads((folders[1] / CONFIG).read_text())
    (folders[1] / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}))
    (folders[0] / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}))
    return {"adapters": folders}


def other_shape(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    wide = adapter(tmp / "wide", LoRA(rank=2), ["q_proj"], lambda: models.llama(hidden_size=24))
    return {"adapters": [pair[0], wide], "force": True}


def no_adapter(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    (tmp / "empty").mkdir()
    return {"adapters": [pair[0], tmp / "empty", tmp / "gone"]}


def full_model(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    return {"adapters": [pair[0], models.save(models.llama(), tmp / "full")]}


def no_base(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    return {"adapters": [pair[0], adapter(tmp / "hra", HRA(rank=2))]}


def wrong_base(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    base = models.save(models.llama(hidden_size=24), tmp / "other base")
    return {"adapters": [pair[0], adapter(tmp / "hra", HRA(rank=2))], "base": base}


def with_biases(method: Settings) -> Callable[[Path, list[Path]], dict[str, Any]]:
    def make(tmp: Path, _: list[Path]) -> dict[str, Any]:
        def build() -> Any:
            model = models.bert()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("query.bias"):
                        parameter.fill_(0.5)
            return model

        base = models.save(build(), tmp / "base")
        folders = [
            adapter(tmp / "lora", LoRA(rank=2), ["query"], build), adapter(tmp / "own", method, ["query"], build),
        ]  # fmt: skip
        return {"adapters": folders, "base": base}

    return make


def mixed_rotations(tmp: Path, pair: list[Path]) -> dict[str, Any]:
    return {"adapters": [adapter(tmp / "hra", HRA(rank=2)), pair[0]], "rule": "karcher"}


def given(**options: Any) -> Callable[[Path, list[Path]], dict[str, Any]]:
    return lambda tmp, pair: options


REFUSED: dict[str, tuple[Callable[[Path, list[Path]], dict[str, Any]], str]] = {
    "different base": (other_base, r"one and \S*wide were made for different base models \(vocab_size: 40 and 50\)"),
    "another base's name": (other_base_name, r"a names the base 'some/base', \S*b names 'other/base'; merge"),
    "layer of another shape": (
        other_shape, r"the layer '\S*q_proj' is not the same in all adapters: 16 x 16 \(linear\) in one; 24 x 24"
    ),
    "NaN in a file": (with_nan, r"adapter_model.safetensors holds values that are not finite \(NaN or infinity\)"),
    "truncated": (truncated_file, "it is truncated or no safetensors file"),
    "too few weights": (given(weights=[1.0]), "1 weights were given for 2 models; give one each, in the same order"),
    "weights that are not finite": (given(weights=[1.0, float("nan")]), "the weights 1, nan are not all finite"),
    "weights too large": (given(weights=[1e300, 1.0]), "is not finite; the weights are too large for float32"),
    "rank 0": (given(rank=0), "rank=0 is not usable; it must be at least 1"),
    "unknown rule": (given(rule="tise"), r"unknown rule 'tise'. Did you mean 'ties'\? The rules are: sum"),
    "unknown option": (
        given(rule="ties", options={"denisty": 1}), r"ties has no option 'denisty'. Did you mean 'density'\?"
    ),
    "option out of bounds": (given(rule="ties", options={"density": 2}), "ties: density=2 is not usable"),
    "options of a rule that has them": (
        given(rule=rule("ties"), options={"density": 0.5}), r"options= go with a rule's name, and ties is one"
    ),
    "missing statistic": (given(rule="fisher"), r"(?s)2 problems.*one.*fisher.*two.*fisher"),
    "three models for slerp": (
        lambda tmp, pair: {"adapters": [*pair, pair[0]], "rule": "slerp"},
        "rule slerp merges exactly 2 models, and 3 were given",
    ),
    "none": (given(adapters=[]), "rule sum merges at least 1 models, and 0 were given"),
    "no adapter": (no_adapter, r"(?s)2 problems:.*empty is no adapter folder: it holds no adapter_config.json.*gone"),
    "a full model among adapters": (full_model, "full is a full model, and no adapter; merge adapters with adapters"),
    "changes that need a base": (no_base, "depends on the base's weights, and the base 'some/base' is not at hand"),
    "base of another shape": (wrong_base, r"(?s)8 problems:.*is 16 x 16 in the adapters, 24 x 24 in the base"),
    "changed biases, hydra": (with_biases(Hydra(rank=2)), r"hydra also changes the bias of '\S*query'"),
    "changed biases, ia3": (with_biases(IA3()), r"ia3 also changes the bias of '\S*query'"),
    "rotations with others": (mixed_rotations, "karcher merges rotations of one method, and here are hra and lora"),
    "rotations cut to a rank": (
        given(rule="karcher", rank=2), "rank= is for rules on changes; karcher merges rotations"
    ),
    "a rule on models": (given(rule="symmetry"), "rule symmetry does not give one adapter"),
    "names that are the same": (given(names=["a", "a"]), "the names a, a are not all different"),
    "too many names": (given(names=["a", "b", "c"]), "3 names were given for 2 models"),
    "a folder twice": (
        lambda tmp, pair: {"adapters": [*pair, pair[0]]}, r"one is given twice; give it once, with twice the weight"
    ),
    "several at once": (given(weights=[1.0], names=["a", "a", "b"]), r"(?s)2 problems:.*1 weights.*3 names"),
    "output that is an input": (
        lambda tmp, pair: {"output": pair[0]}, r"one is one of the adapters to merge; .* another folder"
    ),
}  # fmt: skip


@pytest.mark.parametrize("problem", REFUSED)
def test_what_cannot_be_merged_is_told_and_the_older_output_stays(
    problem: str, tmp_path: Path, pair: list[Path]
) -> None:
    make, message = REFUSED[problem]
    arguments = {"adapters": pair, "output": tmp_path / "out", **make(tmp_path, pair)}
    merge(pair, output=tmp_path / "out", progress=False)
    before, around, inputs = files(tmp_path / "out"), sorted(tmp_path.iterdir()), [files(p) for p in pair]
    with pytest.raises(IsotuneError, match=message) as raised:
        merge(**arguments, progress=False)
    assert "Traceback" not in str(raised.value)
    assert files(tmp_path / "out") == before
    assert [files(p) for p in pair] == inputs
    assert sorted(tmp_path.iterdir()) == around


def test_all_problems_are_told_at_once(tmp_path: Path, pair: list[Path]) -> None:
    wide = adapter(tmp_path / "wide", LoRA(rank=2), ["q_proj"], lambda: models.llama(hidden_size=24))
    with pytest.raises(CheckpointError) as raised:
        merge([*pair, wide], output=tmp_path / "out", progress=False)
    told = str(raised.value)
    assert told.startswith("these adapters cannot be merged; 3 problems:\n  - ")
    assert told.count("different base models") == 1
    assert told.count("is not the same in all adapters") == 2


def test_force_merges_adapters_of_bases_of_one_shape(tmp_path: Path, pair: list[Path]) -> None:
    other = adapter(tmp_path / "other", LoRA(rank=2), ["q_proj"], lambda: models.llama(vocab_size=50))
    merge([pair[0], other], output=tmp_path / "out", force=True, progress=False)
    assert merge(pair, output=tmp_path / "again", force=True, progress=False).ranks[QUERY] == 5


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path: Path, pair: list[Path]) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("x")
    with pytest.raises(CheckpointError, match="the folder exists and holds something else"):
        merge(pair, output=tmp_path / "thesis", progress=False)
    assert (tmp_path / "thesis" / "chapter1.txt").read_text() == "x"


def test_an_interrupted_write_leaves_the_older_output(
    tmp_path: Path, pair: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    merge(pair, output=out, progress=False)
    before = files(out)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("isotune.checkpoint.files.save_file", fail)
    with pytest.raises(CheckpointError, match="no space left on device; nothing there was changed"):
        merge(pair[:1], output=out, progress=False)
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]


# PEFT's own merging, where no test of a rule says it.


def test_peft_adds_dora_as_if_it_were_lora(tmp_path: Path) -> None:
    """PEFT sums A and B and leaves the magnitudes behind; here the change of the whole weight counts."""
    base = models.save(models.llama(), tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj"], use_dora=True)
    theirs = peft_adapt(models.llama(), config, size=0.5)
    theirs.save_pretrained(tmp_path / "dora")
    expected = output(theirs)
    merge([tmp_path / "dora"], output=tmp_path / "out", base=base, progress=False)
    assert_same_output(output(isotune.load(models.llama(), tmp_path / "out").eval()), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.add_weighted_adapter(["default"], [1.0], "cat", combination_type="cat")
    theirs.set_adapter("cat")
    assert float((output(theirs) - expected).abs().max()) > 1e-3


def test_tokenizers_beside_adapters_must_agree(tmp_path: Path) -> None:
    one, two = (adapter(tmp_path / name, LoRA(rank=2)) for name in ("one", "two"))
    with_tokens(one, a=0, b=1)
    with_tokens(two, a=0, c=1)
    with pytest.raises(CheckpointError, match="the tokenizer of two is not that of one, tokens: 1 are missing"):
        merge([one, two], output=tmp_path / "out", progress=False)
    merge([one, two], output=tmp_path / "out", force=True, progress=False)
    with_tokens(two, a=0, b=1)
    merge([one, two], output=tmp_path / "out", progress=False)
