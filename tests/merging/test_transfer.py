"""Skills moved from one model to another of its family, on disk."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import isotune
from isotune import HRA, LoRA
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError
from isotune.merging.symmetry.maps import SYMMETRIES, architecture
from isotune.merging.symmetry.transfer import transfer, transfer_adapter
from isotune.training.export import export_merged
from merging.symmetric_models import drawn_symmetry, model_of, twin
from support import STORIES, adapted, assert_same_output, files, output, stories, tokens

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def written(model: Any, folder: Path, **options: Any) -> Path:
    """A model saved with the tokenizer of stories260K."""
    model.save_pretrained(folder, **options)
    for name in TOKENIZER:
        shutil.copyfile(STORIES / name, folder / name)
    return folder


def read(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def tuned(model: Any, size: float = 0.05, seed: int = 5) -> Any:
    """A copy of the model with every weight changed a little."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def twin_of_stories(use: tuple[str, ...] = SYMMETRIES) -> Any:
    model = stories()
    return twin(model, drawn_symmetry(architecture(model.config), use))


@pytest.mark.parametrize("mode", ["weights", "activations"])
def test_a_skill_moved_to_a_twin_does_what_it_does_at_home(mode: Any, tmp_path: Path) -> None:
    skilled = tuned(stories())
    folders = [written(m, tmp_path / n) for n, m in (("twin", twin_of_stories()), ("skilled", skilled))]
    ids = torch.randint(5, 512, (12, 40))
    done = transfer(folders[0], STORIES, folders[1], tmp_path / "out", mode=mode, tokens=ids)
    moved = read(tmp_path / "out")
    assert done.left_out == {}
    assert_same_output(output(moved), output(skilled))
    assert (output(skilled) - output(stories())).abs().max() > 1
    if mode == "weights":
        assert done.before > 10
        assert done.after < 1e-4
    else:
        assert done.before is None
    text = moved.generate(**tokens(stories()), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert text.equal(skilled.generate(**tokens(stories()), max_new_tokens=3, do_sample=False, pad_token_id=0))
    # Without alignment it does not work, so that this is no easy test.
    transfer(folders[0], STORIES, folders[1], tmp_path / "plain", use=())
    assert (output(read(tmp_path / "plain")) - output(skilled)).abs().max() > 1


def test_without_symmetries_it_is_task_arithmetic(tmp_path: Path) -> None:
    base, skilled, target = stories(), tuned(stories()), tuned(stories(), seed=6)
    folders = [written(m, tmp_path / n) for n, m in (("target", target), ("skilled", skilled))]
    done = transfer(folders[0], STORIES, folders[1], tmp_path / "out", scale=0.3, use=())
    assert done.before == done.after
    found, ours, theirs = (m.state_dict() for m in (base, skilled, target))
    for name, tensor in read(tmp_path / "out").state_dict().items():
        assert tensor.equal(theirs[name] + 0.3 * (ours[name] - found[name]))


def test_the_skilled_model_may_be_the_one_that_is_aligned(tmp_path: Path) -> None:
    skilled = tuned(stories())
    target = twin(skilled, drawn_symmetry(architecture(skilled.config), SYMMETRIES))
    folders = [written(m, tmp_path / n) for n, m in (("target", target), ("skilled", skilled))]
    done = transfer(*[folders[0], STORIES, folders[1], tmp_path / "out"], reference="skilled", scale=-1.0)
    assert done.after < 1e-4
    assert_same_output(output(read(tmp_path / "out")), output(stories()))


def test_nothing_changed_leaves_the_target_bit_for_bit(tmp_path: Path) -> None:
    target = written(twin_of_stories().bfloat16(), tmp_path / "target", max_shard_size="100KB")
    assert len(list(target.glob("*.safetensors"))) > 3
    transfer(target, STORIES, STORIES, tmp_path / "out")
    (tmp_path / "out" / "merge.json").unlink()
    assert files(tmp_path / "out") == files(target)


def test_shards_and_half_precision_stay_as_the_target_has_them(tmp_path: Path) -> None:
    skilled = tuned(stories())
    target = written(twin_of_stories(("permutation",)).bfloat16(), tmp_path / "target", max_shard_size="100KB")
    skilled_folder = written(skilled, tmp_path / "skilled", max_shard_size="200KB")
    transfer(target, STORIES, skilled_folder, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"merge.json"} | {f.name for f in target.iterdir()}
    shards = [load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    assert all(tensor.dtype == torch.bfloat16 for shard in shards for tensor in shard.values())
    assert_same_output(output(read(tmp_path / "out").float()), output(skilled), 0.05)


def test_another_vocabulary_leaves_embeddings_and_head_out(tmp_path: Path) -> None:
    base, target = model_of("llama", vocab_size=60), model_of("llama", seed=1)
    folders = [written(m, tmp_path / n) for n, m in (("target", target), ("base", base), ("skilled", tuned(base)))]
    done = transfer(*folders, tmp_path / "out")
    assert done.left_out.keys() == {"embed_tokens.weight", "lm_head.weight"}
    assert all("vocabularies" in reason for reason in done.left_out.values())
    moved, before = read(tmp_path / "out").state_dict(), target.state_dict()
    assert {n for n in moved if moved[n].equal(before[n])} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_other_tokens_at_the_same_size_are_another_vocabulary(tmp_path: Path) -> None:
    target = written(tuned(stories(), seed=6), tmp_path / "target")
    other = json.loads((target / "tokenizer.json").read_text())
    first, second = list(other["model"]["vocab"])[300:302]
    vocabulary = other["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (target / "tokenizer.json").write_text(json.dumps(other))
    skilled = written(tuned(stories()), tmp_path / "skilled")
    assert transfer(target, STORIES, skilled, tmp_path / "out").left_out.keys() == {"embed_tokens.weight"}
    with pytest.raises(CheckpointError, match="align them by weights"):
        transfer(target, STORIES, skilled, tmp_path / "no", mode="activations", tokens=torch.ones(1, 4).long())
    (target / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer.json cannot be read"):
        transfer(target, STORIES, skilled, tmp_path / "no")


@pytest.mark.parametrize("method", [LoRA(rank=3, alpha=7), HRA(rank=4)])
def test_a_moved_adapter_does_what_its_moved_weights_do(method: Any, tmp_path: Path) -> None:
    model = adapted(stories(), method, "all-linear", size=0.1)
    isotune.save(model, tmp_path / "adapter", base_model=str(STORIES))
    expected = output(model)
    skilled = export_merged(tmp_path / "adapter", tmp_path / "skilled", base=str(STORIES))
    target = written(tuned(twin_of_stories(), 0.01), tmp_path / "target")
    done = transfer_adapter(tmp_path / "adapter", STORIES, target, tmp_path / "lora")
    whole = transfer(target, STORIES, skilled, tmp_path / "out")
    assert (done.before, done.after) == (whole.before, whole.after)
    moved = isotune.load(read(target), tmp_path / "lora").eval()
    assert_same_output(output(moved), output(read(tmp_path / "out")))
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(target)
    assert config["r"] == method.rank
    assert "moved into the basis" in (tmp_path / "lora" / "README.md").read_text()
    exact = transfer_adapter(tmp_path / "adapter", STORIES, written(twin_of_stories(), tmp_path / "twin"),
                             tmp_path / "exact")  # fmt: skip
    assert exact.after < 1e-4
    assert_same_output(output(isotune.load(read(tmp_path / "twin"), tmp_path / "exact").eval()), expected)


def test_an_adapter_that_cannot_be_moved_is_refused(tmp_path: Path) -> None:
    isotune.save(adapted(stories(), LoRA(rank=2), "all-linear"), tmp_path / "lora", base_model=str(STORIES))
    smaller = written(model_of("llama"), tmp_path / "smaller")
    with pytest.raises(CheckpointError, match="do not fit each other: they have layers 5 and 2; hidden 64 and 48"):
        transfer_adapter(tmp_path / "lora", STORIES, smaller, tmp_path / "out")
    head = isotune.adapt(stories(), LoRA(rank=2), "attention", train_also=["lm_head"])
    isotune.save(head, tmp_path / "head", base_model=str(STORIES))
    with pytest.raises(CheckpointError, match=r"modules trained in full \(lm_head\)"):
        transfer_adapter(tmp_path / "head", STORIES, STORIES, tmp_path / "out")
    isotune.save(adapted(stories(), LoRA(rank=2), ["embed_tokens"]), tmp_path / "words", base_model=str(STORIES))
    config = stories().config
    config.vocab_size = 500
    other = written(transformers.LlamaForCausalLM(config), tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"model.embed_tokens is for another vocabulary"):
        transfer_adapter(tmp_path / "words", STORIES, other, tmp_path / "out")
    isotune.save(adapted(stories(), isotune.method("ia3"), "attention"), tmp_path / "ia3", base_model=str(STORIES))
    with pytest.raises(NoLowRankFormError, match="has no exact low-rank form"):
        transfer_adapter(tmp_path / "ia3", STORIES, STORIES, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_the_embedding_is_taken_over(tmp_path: Path) -> None:
    model = adapted(stories(), LoRA(rank=2), ["embed_tokens", "o_proj"], size=0.1)
    isotune.save(model, tmp_path / "words", base_model=str(STORIES))
    target = written(twin_of_stories(), tmp_path / "twin")
    transfer_adapter(tmp_path / "words", STORIES, target, tmp_path / "out")
    assert_same_output(output(isotune.load(read(target), tmp_path / "out").eval()), output(model))


def test_models_that_do_not_fit_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    skilled = written(tuned(stories()), tmp_path / "skilled")
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="do not fit each other: they have layers 5 and 2"):
        transfer(written(model_of("llama"), tmp_path / "small"), STORIES, skilled, out)
    untied = stories()
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(CheckpointError, match=r"the head is tied to the embeddings \(or missing\) in .*skilled"):
        transfer(written(untied, tmp_path / "untied"), STORIES, skilled, out)
    with pytest.raises(OptionError, match="scale=nan"):
        transfer(STORIES, STORIES, skilled, out, scale=math.nan)
    with pytest.raises(OptionError, match="reference 'both' is unknown"):
        transfer(STORIES, STORIES, skilled, out, reference="both")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="the folder exists and holds something else"):
        transfer(STORIES, STORIES, skilled, skilled)
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        transfer(tmp_path, STORIES, skilled, out)
    assert not out.exists()


def damaged(folder: Path, change: Any) -> Path:
    """A copy of stories260K with its tensors changed."""
    shutil.copytree(STORIES, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_values_that_do_not_fit_the_dtype_leave_nothing_behind(tmp_path: Path) -> None:
    name = "model.layers.4.mlp.down_proj.weight"
    huge = damaged(tmp_path / "huge", lambda tensors: tensors[name].mul_(1e30))
    half = written(stories().half(), tmp_path / "half")
    with pytest.raises(CheckpointError, match=r"layers.4.mlp.down_proj.weight would hold values that are not finite"):
        transfer(half, STORIES, huge, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "huge"]


def test_tensors_that_only_some_have(tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    biased = damaged(tmp_path / "biased", lambda tensors: tensors.update({bias: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=r"layers.0.self_attn.q_proj.bias is only in source_skilled"):
        transfer(STORIES, STORIES, biased, tmp_path / "out")
    scored = damaged(tmp_path / "scored", lambda tensors: tensors.update({"score.weight": torch.ones(2, 64)}))
    done = transfer(scored, STORIES, STORIES, tmp_path / "out")
    assert done.left_out == {"score.weight": "it is only in target"}
    eighth = torch.ones(64, dtype=torch.float8_e4m3fn)
    eight = damaged(
        tmp_path / "eight",
        lambda tensors: tensors.update({"model.norm.weight": eighth}),
    )
    with pytest.raises(CheckpointError, match="stored quantised"):
        transfer(STORIES, STORIES, eight, tmp_path / "other")


def test_an_index_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    evil = tmp_path / "evil"
    shutil.copytree(STORIES, evil)
    (evil / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "../other.safetensors"}})
    )
    with pytest.raises(CheckpointError, match=r"names a file outside its folder: ../other.safetensors"):
        transfer(evil, STORIES, STORIES, tmp_path / "out")
