"""Full models merged as a stream: the arithmetic, what each tensor is, and going on after a kill."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from models import Seen, Toy, bert, family, gpt2, in_memory, llama, rewrite, save, stored, tuned
from safetensors.torch import save_file
from torch import Tensor

from isotune.errors import CheckpointError, OptionError
from isotune.linalg.change import Change, dense
from isotune.linalg.low_rank import Factored
from isotune.merging.contract import Aligned, Rule
from isotune.merging.models.merge import merge_checkpoints
from isotune.merging.registry import rule_class, rule_names
from isotune.merging.rules.sum import Sum
from support import STORIES, assert_same_output, files, move, output, stories, tokens

merge = functools.partial(merge_checkpoints, progress=False)
WEIGHTS = [0.7, 1.5]


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize("rule", [Sum(), Toy()], ids=lambda rule: rule.name)
@pytest.mark.parametrize("shard", ["5KB", "5GB", None])
def test_streamed_is_the_same_as_in_memory(rule: Rule, shard: str | None, tmp_path: Path) -> None:
    base, models = family(tmp_path)
    found = merge(models, rule, tmp_path / "out", base, WEIGHTS, max_shard_size=shard)
    assert_same(stored(tmp_path / "out"), in_memory(rule, base, models, WEIGHTS))
    many = len(list((tmp_path / "out").glob("*.safetensors")))
    assert many == len(list(base.glob("*.safetensors"))) if shard is None else (many > 1) == (shard == "5KB")
    assert found.changed == found.tensors == len(stored(base))
    assert (found.factor == 1) == (rule.name == "sum")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "model0", "model1", "out"]


def test_a_merged_pretrained_model_runs_in_transformers(tmp_path: Path) -> None:
    models = [move(stories(), seed=seed, size=0.01) for seed in (1, 2)]
    for i, model in enumerate(models):
        save(model, tmp_path / f"m{i}", shard="300KB")
        shutil.copy(STORIES / "tokenizer.json", tmp_path / f"m{i}")
    merge([tmp_path / "m0", tmp_path / "m1"], Sum(), tmp_path / "out", STORIES, [0.5, 0.25], max_shard_size="200KB")
    expected = stories()
    states = [dict(model.named_parameters()) for model in models]
    with torch.no_grad():
        for name, p in expected.named_parameters():
            p += sum(w * (state[name] - p) for w, state in zip([0.5, 0.25], states, strict=True))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert_same_output(output(loaded, **tokens(stories())), output(expected), 1e-6)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        read("once upon")["input_ids"]
        == transformers.AutoTokenizer.from_pretrained(STORIES)("once upon")["input_ids"]
    )
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert (record["kind"], record["models"]) == ("model", {"m0": 0.5, "m1": 0.25})
    assert record["folders"] == [str(tmp_path / "m0"), str(tmp_path / "m1")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_model_with_weight_one_is_itself_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    base = save(tuned(llama, 0, size=1e3).to(dtype), tmp_path / "base")
    fine = llama().double()
    with torch.no_grad():
        for p in fine.parameters():
            p.div_(3)
    model = save(fine.to(dtype), tmp_path / "model")
    merge([model], Sum(), tmp_path / "out", base)
    own, got, W0 = stored(model), stored(tmp_path / "out"), stored(base)
    assert all(got[name].dtype == dtype and got[name].equal(own[name]) for name in own)
    wide = torch.promote_types(dtype, torch.float32)
    rounded = [W0[name].to(wide) + (own[name].to(wide) - W0[name].to(wide)) for name in own]
    assert any(not found.equal(own[name].to(wide)) for name, found in zip(own, rounded, strict=True))


def test_a_model_that_alone_changed_a_tensor_keeps_it_bit_for_bit(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    a = save(tuned(llama, 1, "layers.0"), tmp_path / "a")
    b = save(tuned(llama, 2, "layers.1"), tmp_path / "b")
    rule = Seen()
    found = merge([a, b], rule, tmp_path / "out", base)
    got, W0 = stored(tmp_path / "out"), stored(base)
    for name, tensor in got.items():
        source = stored(a) if "layers.0" in name else stored(b) if "layers.1" in name else W0
        assert tensor.equal(source[name]), name
    assert len(rule.sites) == found.changed == 18
    assert found.tensors == 21


def test_dtypes_go_in_and_come_out(tmp_path: Path) -> None:
    base, models = family(tmp_path, lambda: llama().bfloat16())
    expected = in_memory(Sum(), base, models, WEIGHTS)
    merge(models, Sum(), tmp_path / "same", base, WEIGHTS)
    W0, own = stored(base), [stored(model) for model in models]
    for name, got in stored(tmp_path / "same").items():
        exact = W0[name].float() + sum(
            w * (m[name].float() - W0[name].float()) for w, m in zip(WEIGHTS, own, strict=True)
        )
        assert got.equal(exact.bfloat16())  # fp32 in between, rounded once
        assert expected[name].dtype == got.dtype
    merge(models, Sum(), tmp_path / "wide", base, WEIGHTS, dtype="float32")
    assert {t.dtype for t in stored(tmp_path / "wide").values()} == {torch.float32}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "wide").dtype == torch.float32
    merge(models, Sum(), tmp_path / "mixed", tmp_path / "wide")
    assert {t.dtype for t in stored(tmp_path / "mixed").values()} == {torch.float32}


def test_models_in_another_dtype_than_the_base_are_noted(tmp_path: Path) -> None:
    base = save(llama(), tmp_path / "base")
    model = save(tuned(llama, 1).bfloat16(), tmp_path / "model")
    found = merge([model], Sum(), tmp_path / "out", base)
    assert found.notes == ["model is stored in another dtype than the base: BF16, not F32"]
    own = stored(model)
    assert all(t.equal(own[name].float()) for name, t in stored(tmp_path / "out").items())


def test_without_a_base_weights_that_sum_to_one_average_the_models(tmp_path: Path) -> None:
    _, models = family(tmp_path, count=3)
    own = [stored(model) for model in models]
    for weights in (None, [0.5, 0.75, -0.25]):
        folder = tmp_path / f"out{weights is None}"
        found = merge(models, Sum(), folder, weights=weights)
        used = weights or [1 / 3] * 3
        assert list(found.models.values()) == used
        expected = {name: sum(w * m[name] for w, m in zip(used, own, strict=True)) for name in own[0]}
        assert_same(stored(folder), expected)
    with pytest.raises(OptionError, match="must sum to 1"):
        merge(models, Sum(), tmp_path / "no", weights=[1, 1, 1])
    with pytest.raises(OptionError, match="name the pretrained model with base"):
        merge(models, Toy(), tmp_path / "no")


@pytest.mark.parametrize("name", [n for n in rule_names() if getattr(rule_class(n), "linear", False)])
def test_rules_that_say_they_are_linear_give_the_weighted_sum(name: str) -> None:
    rule: Any = rule_class(name)()
    generator = torch.Generator().manual_seed(0)
    changes = tuple(torch.randn(5, 4, generator=generator) for _ in range(3))
    weights = (0.5, 0.7, -0.2)
    site = Aligned("a", ("x", "y", "z"), changes, weights)
    found = rule.merge(site, rule.survey([site]))
    expected = sum(w * change for w, change in zip(weights, changes, strict=True))
    torch.testing.assert_close(dense(found), expected)
    assert rule.rescale([1.0, 2.0, 3.0], 5.0) == 1.0


def test_what_lies_beside_the_weights_is_the_bases(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    beside = {"chat_template.jinja": "x", "special_tokens_map.json": "{}", "merges.txt": "a b", "spiece.model": "y"}
    for name in (*beside, "README.md", "trainer_state.json", "optimizer.bin"):
        (base / name).write_text(beside.get(name, "no"))
    (base / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text("{}")
    merge(models, Sum(), tmp_path / "out", base)
    found = files(tmp_path / "out")
    made = {"model.safetensors", "merge.json", "config.json", "generation_config.json", "tokenizer.json"}
    assert found.keys() == beside.keys() | made | {"modules.json", "1_Pooling/config.json"}
    assert all(
        found[name] == (base / name).read_bytes() for name in found.keys() - {"model.safetensors", "merge.json"}
    )


def test_a_factored_answer_is_written_dense(tmp_path: Path) -> None:
    class Split(Rule):
        name: ClassVar[str] = "split"

        def merge(self, site: Aligned, surveyed: Any) -> Change:
            change = site.dense()[0]
            return Factored(change, torch.eye(change.shape[1])) if site.matrix else change

    base, models = family(tmp_path, count=1)
    merge(models, Split(), tmp_path / "out", base)
    assert_same(stored(tmp_path / "out"), stored(models[0]))


# What the tensors are


def test_integers_and_booleans_are_the_bases(tmp_path: Path) -> None:
    base, models = family(tmp_path, count=2)
    buffers = {"model.ids": torch.arange(5), "model.mask": torch.tensor([True, False]), "n": torch.tensor(3)}
    rewrite(base, lambda tensors: tensors.update(buffers))
    rewrite(models[0], lambda tensors: tensors.update({name: t ^ 1 for name, t in buffers.items()}))
    found = merge(models, Sum(), tmp_path / "out", base)
    got = stored(tmp_path / "out")
    assert all(got[name].equal(t) and got[name].dtype == t.dtype for name, t in buffers.items())
    assert found.changed == found.tensors - 3


@pytest.mark.parametrize("build", [lambda: llama(tie_word_embeddings=True), bert], ids=["llama", "bert"])
def test_tied_tensors_are_merged_once(build: Callable[[], Any], tmp_path: Path) -> None:
    base, models = family(tmp_path, build)
    kept = stored(base).keys()
    ties = build().all_tied_weights_keys

    def untie(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensors[source].clone() for name, source in ties.items()}

    merge(models, once := Seen(), tmp_path / "plain", base)
    for folder in (base, models[1]):
        rewrite(folder, untie)  # as other tools write them
    merge(models, again := Seen(), tmp_path / "copies", base)
    assert stored(tmp_path / "copies").keys() == kept
    assert again.sites == once.sites
    assert len(again.sites) == len(kept)
    assert_same(stored(tmp_path / "copies"), stored(tmp_path / "plain"), 0)
    kind = getattr(
        transformers, build().config.architectures[0] if build().config.architectures else type(build()).__name__
    )
    loaded, info = kind.from_pretrained(tmp_path / "copies", output_loading_info=True)
    assert not info["missing_keys"]
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_names_that_the_metadata_shares_are_found(tmp_path: Path) -> None:
    base, models = family(tmp_path, lambda: llama(tie_word_embeddings=True))
    merge(models, Sum(), tmp_path / "plain", base)
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"

    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[head] = tensors.pop(embeddings)

    rewrite(models[0], rename, {embeddings: head})  # safetensors.torch.save_model keeps either name
    rewrite(models[1], rename)
    merge(models, Sum(), tmp_path / "out", base)
    assert_same(stored(tmp_path / "out"), stored(tmp_path / "plain"), 0)


def test_tied_tensors_that_differ_are_refused(tmp_path: Path) -> None:
    base, models = family(tmp_path, lambda: llama(tie_word_embeddings=True), count=1)
    rewrite(models[0], lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(CheckpointError, match=r"model0 .*ties 'lm_head.weight' to 'model.embed_tokens.weight', but"):
        merge(models, Sum(), tmp_path / "out", base)


@pytest.mark.parametrize("tied", ["base", "model0", "both"])
def test_where_some_models_are_tied_and_some_are_not_the_merged_one_has_its_own_head(
    tied: str, tmp_path: Path
) -> None:
    """Each model's head is what it computes with: a tied one's are its embeddings."""
    embeddings, head = "model.embed_tokens.weight", "lm_head.weight"
    base, models = family(tmp_path, lambda: llama(tie_word_embeddings=False), count=2)
    for folder, name in ((base, "base"), (models[0], "model0")):
        if tied in (name, "both"):
            rewrite(folder, lambda tensors: tensors.pop(head))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    found = merge(models, Sum(), tmp_path / "out", base, [0.5, 0.25])
    got, of = stored(tmp_path / "out"), {p: stored(p) for p in (base, *models)}
    changes = [of[p].get(head, of[p][embeddings]) - of[base].get(head, of[base][embeddings]) for p in models]
    right = of[base].get(head, of[base][embeddings]) + 0.5 * changes[0] + 0.25 * changes[1]
    torch.testing.assert_close(got[head], right)
    assert "has its own" in found.notes[0]
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, got[head])
    assert torch.equal(loaded.model.embed_tokens.weight, got[embeddings])


def test_layers_are_matrices_as_out_by_in(tmp_path: Path) -> None:
    base, models = family(tmp_path, gpt2, count=1)
    merge(models, rule := Seen(), tmp_path / "out", base, [0.5])
    sites = rule.sites
    assert sites["transformer.h.0.attn.c_attn"] == ((24, 8), True)
    assert sites["transformer.h.0.mlp.c_fc"] == ((32, 8), True)
    assert sites["transformer.wte.weight"] == ((40, 8), False)
    assert sites["transformer.wpe.weight"] == ((16, 8), False)
    assert sites["transformer.h.0.ln_1.weight"] == ((8,), False)
    assert sites["transformer.h.0.attn.c_attn.bias"] == ((24,), False)
    W0, W1 = stored(base), stored(models[0])
    assert_same(stored(tmp_path / "out"), {name: W0[name] + 0.5 * (W1[name] - W0[name]) for name in W0})


def test_without_the_model_class_names_and_model_type_decide(tmp_path: Path) -> None:
    for name, build in (("gpt2", gpt2), ("llama", llama)):
        base, models = family(tmp_path / name, build, count=1)
        merge(models, by_class := Seen(), tmp_path / name / "out", base, [0.5])
        for folder in (base, *models):
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"architectures": ["SomeoneElsesModel"]}))
        merge(models, by_name := Seen(), tmp_path / name / "out2", base, [0.5])
        assert by_name.sites == by_class.sites
        assert_same(stored(tmp_path / name / "out2"), stored(tmp_path / name / "out"), 0)


def test_convolutions_are_flattened_and_restored(tmp_path: Path) -> None:
    vit = lambda: transformers.ViTModel(  # noqa: E731
        transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
                               image_size=8, patch_size=4)
    )  # fmt: skip
    folders = [tmp_path / "base", tmp_path / "model"]
    torch.manual_seed(0)
    vit().save_pretrained(folders[0])
    vit().save_pretrained(folders[1])
    merge(folders[1:], rule := Seen(), tmp_path / "out", folders[0], [0.5])
    assert rule.sites["embeddings.patch_embeddings.projection"] == ((8, 48), True)
    assert rule.sites["embeddings.cls_token"] == ((1, 1, 8), False)
    W0, W1 = stored(folders[0]), stored(folders[1])
    assert_same(stored(tmp_path / "out"), {name: W0[name] + 0.5 * (W1[name] - W0[name]) for name in W0})


# Interruptions


class Interrupted(Toy):
    """The toy rule, until some sites are merged."""

    left: ClassVar[int] = 10**9
    how: ClassVar[Callable[[], Any]]
    merged: ClassVar[list[str]] = []

    def merge(self, site: Aligned, surveyed: Any) -> Change:
        Interrupted.left -= 1
        if Interrupted.left < 0:
            Interrupted.how()
        Interrupted.merged.append(site.path)
        return super().merge(site, surveyed)


class InterruptedSum(Interrupted):
    """The same, with nothing to rescale."""

    name: ClassVar[str] = "interrupted sum"
    rescale = Rule.rescale


@pytest.fixture(autouse=True)
def _uninterrupted() -> Iterator[None]:
    yield
    Interrupted.left = 10**9


def killed_after(sites: int, job: Callable[[], Any]) -> None:
    """Run a merge in another process, which is killed after some sites."""
    child = os.fork()
    if child == 0:
        try:
            Interrupted.left, Interrupted.how = sites, lambda: os.kill(os.getpid(), signal.SIGKILL)
            job()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("rule", [Interrupted(), InterruptedSum()], ids=["rescaled", "plain"])
def test_a_killed_merge_goes_on_to_the_same_bits(rule: Rule, tmp_path: Path) -> None:
    base, models = family(tmp_path)
    arguments: dict[str, Any] = {"base": base, "weights": WEIGHTS, "max_shard_size": "5KB"}
    merge(models, rule, tmp_path / "whole", **arguments)
    killed_after(13, lambda: merge(models, rule, tmp_path / "out", **arguments))
    assert not (tmp_path / "out").exists()
    work = tmp_path / ".out.merging"
    finished = {p: p.stat().st_mtime_ns for p in work.rglob("*.safetensors")}
    assert len(finished) > 2
    Interrupted.merged.clear()
    killed_after(3, lambda: merge(models, rule, tmp_path / "out", resume=True, **arguments))
    merge(models, rule, tmp_path / "out", resume=True, **arguments)
    assert len(Interrupted.merged) < 21 - 8  # what was finished is not merged again
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not work.exists()


def test_finished_files_stay_as_they_are(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    arguments: dict[str, Any] = {"base": base, "max_shard_size": "5KB"}
    killed_after(13, lambda: merge(models, InterruptedSum(), tmp_path / "out", **arguments))
    done = json.loads((tmp_path / ".out.merging" / "done.json").read_text())
    before = {name: (tmp_path / ".out.merging" / "model" / name).stat() for name in done["shards"]}
    assert before
    merge(models, InterruptedSum(), tmp_path / "out", resume=True, **arguments)
    after = {name: (tmp_path / "out" / name).stat() for name in before}
    assert all((after[n].st_ino, after[n].st_mtime_ns) == (before[n].st_ino, before[n].st_mtime_ns) for n in before)


def test_a_failed_merge_can_go_on_or_is_refused(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("stop")

    base, models = family(tmp_path)
    arguments: dict[str, Any] = {"base": base, "max_shard_size": "5KB"}
    Interrupted.left, Interrupted.how = 0, fail
    with pytest.raises(RuntimeError, match="stop"):
        merge(models, InterruptedSum(), tmp_path / "out", **arguments)
    work = tmp_path / ".out.merging"
    assert not work.exists()  # nothing was finished
    Interrupted.left = 13
    with pytest.raises(RuntimeError, match="stop"):
        merge(models, InterruptedSum(), tmp_path / "out", **arguments)
    Interrupted.left = 10**9
    with pytest.raises(CheckpointError, match=r"holds an interrupted merge .* resume=True"):
        merge(models, InterruptedSum(), tmp_path / "out", **arguments)
    with pytest.raises(CheckpointError, match="started with other options, weights;"):
        merge(models, InterruptedSum(noise=0.2), tmp_path / "out", resume=True, weights=[2, 1], **arguments)
    shard = next(iter((work / "model").iterdir()))
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"altered or damaged; remove .*\.out\.merging and"):
        merge(models, InterruptedSum(), tmp_path / "out", resume=True, **arguments)
    shard.write_bytes(kept)
    rewrite(models[0], lambda tensors: tensors["model.norm.weight"].add_(1))
    with pytest.raises(CheckpointError, match="started with other models"):
        merge(models, InterruptedSum(), tmp_path / "out", resume=True, **arguments)


def test_two_processes_do_not_write_the_same_output(tmp_path: Path) -> None:
    class Nested(Sum):
        def merge(self, site: Aligned, surveyed: Any) -> Change:
            merge(models, Sum(), tmp_path / "out", base)
            raise AssertionError

    base, models = family(tmp_path)
    with pytest.raises(CheckpointError, match="another process is merging into"):
        merge(models, Nested(), tmp_path / "out", base)


def test_resume_with_nothing_to_resume_starts(tmp_path: Path) -> None:
    base, models = family(tmp_path)
    merge(models, Sum(), tmp_path / "out", base, resume=True)
    assert_same(stored(tmp_path / "out"), in_memory(Sum(), base, models, [1, 1]))


# Memory

MEMORY = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[2])
from models import Toy
from isotune.merging.models.merge import merge_checkpoints
from isotune.merging.rules.sum import Sum

def merge(folder):
    for rule in (Sum(), Toy()):
        merge_checkpoints([folder / "1", folder / "2"], rule, folder / rule.name, folder / "0", progress=False)
        yield peak()

def peak():
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))

torch.set_num_threads(1)
*_, before = merge(Path(sys.argv[1]) / "warm")
print(*(after - before for after in merge(Path(sys.argv[1]) / "large")))
"""


def layers(folder: Path, side: int, count: int, offset: float) -> None:
    """A model of square matrices, one in each file."""
    folder.mkdir(parents=True)
    W = torch.rand(side, side)
    for i in range(count):
        save_file({f"{i}.weight": W + i + offset}, folder / f"part{i}.safetensors")
    weight_map = {f"{i}.weight": f"part{i}.safetensors" for i in range(count)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "none"}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux's /proc")
def test_memory_is_a_few_tensors_whatever_the_size_of_the_models(tmp_path: Path) -> None:
    side = 1280
    for name, *size in (("warm", 64, 1), ("large", side, 16)):
        for model in range(3):
            layers(tmp_path / name / str(model), *size, offset=model / 8)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(Path(__file__).parent)],
        # So that freed tensors are given back at once, as large ones always are.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    by_sum, by_toy = (int(peak) / (4 * side * side) for peak in done.stdout.split())
    # Two models: their changes, one tensor as stored, one from the rule. All are 48 tensors.
    assert by_sum < 5
    assert by_toy < 10  # a survey's loop holds one site while the next is read; the noise is three tensors more
    print(by_sum, by_toy)
