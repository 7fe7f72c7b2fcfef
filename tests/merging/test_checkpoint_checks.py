"""What is found out before full models are merged, and what only their values show."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import transformers
from models import Toy, bert, family, gpt2, llama, reconfigure, rewrite, save, stored, tuned
from safetensors.torch import load_file, save_file
from torch import Tensor

from isotune.checkpoint import stored_models
from isotune.checkpoint.streaming import parse_size
from isotune.checkpoint.tensor_kinds import tensor_kinds
from isotune.checkpoint.vocabularies import token_ids
from isotune.errors import CheckpointError, OptionError
from isotune.linalg.change import Change
from isotune.merging.contract import Aligned, RotationRule, Rule
from isotune.merging.models.checks import check_checkpoints
from isotune.merging.models.merge import merge_checkpoints
from isotune.merging.rules.sum import Sum

merge = functools.partial(merge_checkpoints, progress=False)
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def refusal(folders: list[Path], base: Path | None, monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    """The message of a refusal, which must come before any tensor is read and leave nothing behind."""

    def read(*_: Any) -> Tensor:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(stored_models, "read_tensor", read)
    output = folders[0].parent / "out"
    with pytest.raises(CheckpointError) as caught:
        merge(folders, Sum(), output, base, **options)
    assert not output.exists()
    assert not list(output.parent.glob(".*"))
    return str(caught.value)


def test_all_shapes_that_differ_are_listed_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path)
    one, other = (
        save(llama(intermediate_size=20), tmp_path / "narrow"),
        save(llama(num_hidden_layers=3), tmp_path / "tall"),
    )
    for model in (one, other):
        reconfigure(model, **json.loads((base / "config.json").read_text()))
    message = refusal([models[0], one, other], base, monkeypatch)
    lines = message.splitlines()
    assert lines[0] == "these models cannot be merged:"
    assert len(lines) == 3
    assert lines[1].startswith("- narrow has other shapes than the base: ")
    assert lines[1].count(", not ") == 6
    assert "model.layers.0.mlp.gate_proj.weight [20, 16], not [24, 16]" in lines[1]
    assert "model.layers.1.mlp.down_proj.weight [16, 20], not [16, 24]" in lines[1]
    assert lines[2].startswith("- tall has tensors that the base lacks: model.layers.2.input_layernorm.weight, ")


def test_every_kind_of_problem_is_in_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path, count=4)
    rewrite(models[0], lambda tensors: tensors.pop("model.norm.weight"))
    reconfigure(models[1], hidden_act="gelu", rms_norm_eps=1e-3)
    rewrite(models[2], lambda tensors: tensors.update({HEAD: tensors[HEAD].to(torch.int64)}))
    tokens = [f"t{i}" for i in range(38)] + ["<eot>", "t38"]
    save(tuned(llama, 3), models[3], tokens=tokens)
    message = refusal(models, base, monkeypatch)
    assert "- model0 lacks tensors that the base has: model.norm.weight" in message
    assert (
        "- model1 has another config than the base: hidden_act='gelu' (not 'silu'), rms_norm_eps=0.001 (not"
        in message
    )
    assert f"- model2 has integers where the base has floats: {HEAD} (I64, not F32)" in message
    assert (
        "- model3 has another vocabulary than the base, tokens: 1 have another id ('t38'), 1 are missing ('t39'), "
        "1 are new ('<eot>'); with vocabulary='intersect'"
    ) in message
    assert message.count("\n- ") == 4


class Broken(NamedTuple):
    """A way in which a folder can be unusable, and what the message must say."""

    change: Callable[[Path], Any]
    said: str


def cut(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-10])


def pickled(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def fp8(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[HEAD].to(torch.float8_e4m3fn)


BROKEN = {
    "no weights": Broken(pickled, "holds no model.safetensors"),
    "no config": Broken(lambda folder: (folder / "config.json").unlink(), "it holds no config.json"),
    "bad config": Broken(lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "truncated": Broken(cut, "it is missing or truncated"),
    "missing shard": Broken(lambda f: sorted(f.glob("*.safetensors"))[1].unlink(), "it is missing or truncated"),
    "quantised": Broken(lambda f: reconfigure(f, quantization_config={"bits": 4}), "before they are quantised"),
    "fp8": Broken(lambda f: rewrite(f, fp8), f"of a dtype that cannot be merged: {HEAD} (F8_E4M3)"),
    "other type": Broken(lambda f: reconfigure(f, model_type="mistral"), "model_type mistral, not llama"),
    "other class": Broken(
        lambda f: reconfigure(f, architectures=["LlamaModel"]), "architectures ['LlamaModel'], not"
    ),
    "bad tokenizer": Broken(lambda f: (f / "tokenizer.json").write_text("[]"), "tokenizer.json cannot be read"),
    "no folder": Broken(lambda folder: shutil.rmtree(folder), "is no folder here and could not be had from the hub"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_unusable_folders_are_refused(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base, models = family(tmp_path)
    BROKEN[kind].change(models[1])
    message = refusal(models, base, monkeypatch)
    assert message.count("\n- ") == 1
    assert "- model1" in message
    assert BROKEN[kind].said in message


def test_an_index_that_names_more_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path)
    index = models[0] / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    found["weight_map"]["more"] = next(iter(found["weight_map"].values()))
    index.write_text(json.dumps(found))
    assert "its index names tensors that its files lack: more" in refusal(models, base, monkeypatch)


def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, models = family(tmp_path)
    index = base / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"../model0/model-'))
    assert "the base (" in (message := refusal(models, base, monkeypatch))
    assert "names a file outside its folder: ../model0/model-" in message


def test_configs_may_differ_in_what_does_not_compute(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    reconfigure(models[0], transformers_version="4.0", use_cache=False, attention_dropout=0.1, _name_or_path="x",
                torch_dtype="bfloat16", bos_token_id=3, max_position_embeddings=64)  # fmt: skip
    file = models[1] / "config.json"
    short = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("rms_norm_eps", "mlp_bias")}
    file.write_text(json.dumps(short))  # as an older version writes it, without what has a default
    assert check_checkpoints(models, base).notes == ()
    reconfigure(models[1], rope_parameters={"rope_theta": 5e5, "rope_type": "default"})
    with pytest.raises(CheckpointError, match=r"rope_parameters.rope_theta=500000.0 \(not 10000.0\)"):
        check_checkpoints(models, base)


def test_too_little_space_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, models = family(tmp_path)

    class Usage(NamedTuple):
        free: int

    size = sum(t.numel() * 4 for t in stored(base).values())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size - 1))
    assert "free some" in refusal(models, base, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(size))
    merge(models, Sum(), tmp_path / "out", base)
    with pytest.raises(CheckpointError, match="of free space, and merging needs"):
        merge(models, Toy(), tmp_path / "toy", base)  # its changes wait on the disk for the factor


def test_outputs_are_not_written_over(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    with pytest.raises(CheckpointError, match="the folder exists and holds something else"):
        merge(models, Sum(), base, base)
    (tmp_path / "empty").mkdir()
    merge(models, Sum(), tmp_path / "empty", base)
    assert stored(tmp_path / "empty")


@pytest.mark.parametrize("where", ["base", "model1"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_name_the_tensor_and_the_model(where: str, value: float, tmp_path: Path) -> None:
    base, models = family(tmp_path)

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    rewrite(tmp_path / where, spoil)
    label = "the base" if where == "base" else "model1"
    said = rf"'model.layers.1.mlp.up_proj.weight' of {label} \(.*{where}\) holds values that are not finite"
    with pytest.raises(CheckpointError, match=said):
        merge(models, Sum(), tmp_path / "out", base)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1"]


def test_a_result_that_does_not_fit_its_dtype_is_refused(tmp_path: Path) -> None:
    base, models = family(tmp_path, lambda: llama().half())
    with pytest.raises(CheckpointError, match=r"the merged .* values that do not fit into torch.float16"):
        merge(models, Sum(), tmp_path / "out", base, [1e7, 1e7])


# Options


class Pair(Sum):
    """The sum, of two models only."""

    name: ClassVar[str] = "pair"
    models: ClassVar[tuple[int, int | None]] = (2, 2)


class Fisher(Rule):
    """A rule that needs a statistic."""

    name: ClassVar[str] = "needs"
    statistic = "fisher"

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        return site.changes[0]


class Turn(RotationRule):
    """A rule on rotations."""

    name: ClassVar[str] = "turn"

    def merge(self, site: Any, parts: Any, weights: Any) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "1 weights were given for 3 models"),
        ({"weights": [1.0, float("nan"), 1.0]}, "not all finite"),
        ({"names": ["a", "a", "b"]}, "all different"),
        ({"names": ["a"]}, "1 names were given for 3 models"),
        ({"dtype": "int8"}, "dtype 'int8' is not usable"),
        ({"max_shard_size": "5 apples"}, "max_shard_size='5 apples' is not usable"),
        ({"vocabulary": "union"}, "it is 'error' or 'intersect'"),
        ({"rule": Pair()}, "merges exactly 2 models, and 3 were given"),
        ({"rule": Turn()}, "merges adapters that rotate, not full models"),
        ({"rule": Fisher(), "statistics": ["one"]}, "needs a statistic of every weight"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, models = family(tmp_path, count=3)
    with pytest.raises(OptionError, match=said):
        merge(models, **{"rule": Sum(), "output": tmp_path / "out", "base": base, **options})
    assert not (tmp_path / "out").exists()


class Averaged(Fisher):
    """`Σ F_i ΔW_i / Σ F_i`."""

    name: ClassVar[str] = "averaged"

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        F = [torch.ones_like(site.dense()[0]) if f is None else f for f in site.statistics]
        return sum((f * d for f, d in zip(F, site.dense(), strict=True)), torch.zeros(())) / sum(F)


def statistics_of(models: list[Path], odd: Callable[[dict[str, Tensor]], Any] = lambda _: None) -> list[Path]:
    """Drawn statistics of every tensor but the norms, under the layers' paths for most."""
    made = []
    for i, model in enumerate(models):
        torch.manual_seed(i)
        drawn = {n.removesuffix(".weight"): torch.rand(t.shape) for n, t in stored(model).items() if "norm" not in n}
        drawn[HEAD] = drawn.pop("lm_head")
        odd(drawn)
        save_file(drawn, model.parent / f"statistics{i}.safetensors")
        made.append(model.parent / f"statistics{i}.safetensors")
    return made


@pytest.mark.parametrize("build", [llama, gpt2], ids=["llama", "gpt2"])
def test_statistics_reach_the_rule_in_the_shape_of_the_weight(build: Callable[[], Any], tmp_path: Path) -> None:
    base, models = family(tmp_path, build)
    if build is gpt2:
        for folder in (base, *models):
            rewrite(folder, lambda t: t.update({HEAD: t["transformer.wte.weight"].clone()}))
    measured = statistics_of(models)
    merge(models, Averaged(), tmp_path / "out", base, statistics=measured)
    W0, own, F = stored(base), [stored(m) for m in models], [load_file(file) for file in measured]
    for name, got in stored(tmp_path / "out").items():
        f = [found.get(name, found.get(name.removesuffix(".weight"), torch.ones(1))) for found in F]
        change = sum(f_i * (W[name] - W0[name]) for f_i, W in zip(f, own, strict=True)) / sum(f)
        torch.testing.assert_close(got, W0[name] + change)


def test_statistics_that_cannot_be_used(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    with pytest.raises(OptionError, match="uses no statistics"):
        merge(models, Sum(), tmp_path / "out", base, statistics=statistics_of(models))
    for odd, said in (
        (
            lambda t: t.update({HEAD: torch.ones(3)}),
            r"model1 .* other shapes than the model: lm_head.weight \[3\], not",
        ),
        (lambda t: t[HEAD].sub_(1), "hold values in 'lm_head.weight' that are negative or not finite"),
        (lambda t: [t.pop(name) for name in list(t)], "are of none of the model's tensors"),
    ):
        with pytest.raises(CheckpointError, match=said):
            merge(models, Averaged(), tmp_path / "out", base, statistics=statistics_of(models, odd))
    with pytest.raises(CheckpointError, match="it is missing or truncated"):
        merge(models, Averaged(), tmp_path / "out", base, statistics=[tmp_path / "none"] * 2)


def test_names_are_the_shortest_ends_that_tell_paths_apart(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    places = [tmp_path / "math" / "checkpoint-9", tmp_path / "code" / "checkpoint-9"]
    for model, place in zip(models, places, strict=True):
        shutil.copytree(model, place)
    found = merge(places, Sum(), tmp_path / "out", base)
    assert list(found.models) == ["math/checkpoint-9", "code/checkpoint-9"]
    with pytest.raises(OptionError, match="given twice"):
        merge([models[0], models[0]], Sum(), tmp_path / "no", base)
    with pytest.raises(OptionError, match="nothing to merge"):
        merge([], Sum(), tmp_path / "no", base)


def test_sizes_are_read_as_people_write_them() -> None:
    assert [parse_size(s) for s in (7, "7", "5GB", "1.5 MB", "20kb")] == [7, 7, 5 * 10**9, 1500000, 20000]


# Vocabularies


def test_rows_of_the_same_token_are_merged_and_others_are_the_bases(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    moved = ["t1", "t0", *[f"t{i}" for i in range(2, 38)], "<new>", "t38", "<more>"]  # t39 is missing
    small = [f"t{i}" for i in range(30)]
    models = [
        save(tuned(lambda: llama(vocab_size=41), 1), tmp_path / "large", tokens=moved),
        save(tuned(lambda: llama(vocab_size=30), 2), tmp_path / "small", tokens=small),
    ]
    with pytest.raises(CheckpointError) as caught:
        merge(models, Sum(), tmp_path / "out", base)
    assert f"{HEAD} [41, 16], not [40, 16]" in str(caught.value)
    assert "10 are missing ('t30', 't31', 't32')" in str(caught.value)
    found = merge(models, Sum(), tmp_path / "out", base, [0.5, 0.25], vocabulary="intersect")
    assert [note.split(",")[0] for note in found.notes] == [
        "39 of 40 embeddings of large are merged", "30 of 40 embeddings of small are merged",
    ]  # fmt: skip
    W0, large, little, got = stored(base), stored(models[0]), stored(models[1]), stored(tmp_path / "out")
    for name in (EMBEDDINGS, HEAD):
        for row in range(40):
            expected = W0[name][row].clone()
            if f"t{row}" in moved:
                expected += 0.5 * (large[name][moved.index(f"t{row}")] - W0[name][row])
            if f"t{row}" in small:
                expected += 0.25 * (little[name][row] - W0[name][row])
            torch.testing.assert_close(got[name][row], expected)
    assert got[EMBEDDINGS][39].equal(W0[EMBEDDINGS][39])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 40


def test_other_shapes_are_errors_with_any_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save(llama(), tmp_path / "base")
    model = save(llama(hidden_size=8, vocab_size=30), tmp_path / "m", tokens=[f"t{i}" for i in range(30)])
    message = refusal([model], base, monkeypatch, vocabulary="intersect")
    assert f"{EMBEDDINGS} [30, 8], not [40, 16]" in message
    assert "hidden_size=8 (not 16)" in message


def test_without_tokenizers_the_sizes_must_agree(tmp_path: Path) -> None:
    base, models = family(tmp_path, count=1)
    (models[0] / "tokenizer.json").unlink()
    notes = merge(models, Sum(), tmp_path / "out", base).notes
    assert notes == ["the tokens of model0 were not compared: no tokenizer.json in model0"]
    other = save(llama(vocab_size=41), tmp_path / "other")
    (other / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"without a tokenizer.json beside each of them"):
        merge([other], Sum(), tmp_path / "no", base, vocabulary="intersect")


def test_tokens_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    assert token_ids(tmp_path) is None
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    assert token_ids(tmp_path) == {"a": 0, "b": 1}
    (tmp_path / "vocab.json").write_text('{"a": 1, "b": 0}')
    assert token_ids(tmp_path) == {"a": 1, "b": 0}
    added = [{"id": 2, "content": "<x>"}]
    for vocabulary in ({"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]):
        (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": added}))
        assert token_ids(tmp_path) == {"a": 0, "b": 1, "<x>": 2}


# What tensors are


def test_kinds_hold_for_files_with_another_prefix(tmp_path: Path) -> None:
    save(bert(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    shapes = {name: tuple(t.shape) for name, t in stored(tmp_path).items()}
    kinds = tensor_kinds(tmp_path, config, shapes)
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert query in kinds.matrices
    assert kinds.path(query) == query.removesuffix(".weight")
    assert kinds.path(f"{query[:-6]}bias") == f"{query[:-6]}bias"
    bare = tensor_kinds(tmp_path, config, {name.removeprefix("bert."): shape for name, shape in shapes.items()})
    assert {name.removeprefix("bert.") for name in kinds.matrices} == bare.matrices
    assert not any("embeddings" in name for name in kinds.matrices)
