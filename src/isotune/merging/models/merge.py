"""Full models into one, tensor by tensor: no model is ever in memory as a whole.

What is in memory: the changes of all models to one tensor (fp32), the tensor itself, and what the rule makes of them.
Files are written as they are computed; see `shards` and `unfinished`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from isotune.checkpoint.export import DTYPES
from isotune.checkpoint.files import check_writable
from isotune.checkpoint.streaming import Entry, by_file, by_size, parse_size, write_index
from isotune.errors import OptionError
from isotune.folders import MODEL_CONFIG
from isotune.merging.adapters.checks import check_options
from isotune.merging.contract import AnyRule, Rule
from isotune.merging.models.checks import ModelInputs, Vocabulary, check_checkpoints, no_space, refuse
from isotune.merging.models.statistics import read_statistics
from isotune.merging.models.tensorwise import Tensorwise
from isotune.merging.models.unfinished import Unfinished
from isotune.merging.record import MergedModel
from isotune.progress import counting
from isotune.version import __version__

_COMPANIONS = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}
_OF_TRAINING = re.compile(r"trainer_state\.json|.*_results\.json|.*\.index\.json")


@torch.no_grad()
def merge_checkpoints(
    folders: Sequence[str | Path],
    rule: AnyRule,
    output: str | Path,
    base: str | Path | None = None,
    weights: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    statistics: Sequence[str | Path] | None = None,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    max_shard_size: int | str | None = "5GB",
    vocabulary: Vocabulary = "error",
    resume: bool = False,
    progress: bool = True,
) -> MergedModel:
    """Merge fine-tuned models by a rule on their changes `ΔW_i = W_i - W_0`, and write a transformers model folder.

    One tensor at a time is read, merged in fp32 (float64 where it is stored so) and written in its stored dtype.
    Integers and booleans are the base's; tied tensors are merged once; a tensor that no model changed is copied, and
    the rule does not see it. Where the merged change is exactly that of one model, that model's tensor is written,
    not `W_0 + (W_i - W_0)`, which rounding makes another. Config and tokenizer are the base's.

    Interrupted, even by a kill, it can be continued with the same arguments and `resume`: finished files are checked
    against their digests and kept, and the result is the same bit for bit. The output appears in one step at the end.

    Args:
        folders: Model folders or hub ids, in one file or in shards.
        rule: A rule on changes.
        output: The folder to write; it must be absent or empty.
        base: The pretrained model that all were fine-tuned from. Rules that give `Σ w_i ΔW_i` need none: the result
            is then `Σ w_i W_i`, with weights that sum to 1.
        weights: One for each model; by default 1 each, and without a base 1/T each.
        names: What to call the models; by default what tells their paths apart. What is drawn depends on them.
        statistics: For rules that need them, a safetensors file for each model with the statistic of each of its
            weights (Fisher information, say), by the tensor's name or its layer's path, in the tensor's shape; by
            default what a run left in the model's folder.
        seed: For rules that draw.
        dtype: What to store: float32, float16 or bfloat16; by default as the base does.
        max_shard_size: The largest size of a file, such as "5GB"; None for the files that the base has.
        vocabulary: Where tokenizers differ: "error" refuses; "intersect" merges the rows of embeddings and output
            heads that have the same token as the base, and leaves the base's other rows as they are.
        resume: Continue an interrupted merge into this output, if there is one.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Raises:
        OptionError: The rule cannot take these models, a weight, name, dtype or size that is not usable.
        CheckpointError: The models do not fit each other (every reason in one message), a tensor that is not finite
            or becomes so, or an output that cannot be written.
    """
    if not isinstance(rule, Rule):
        raise OptionError(f"the rule {rule.name!r} merges adapters that rotate, not full models; choose another rule")
    names = check_options(folders, rule, weights, names)
    weights = _weights(rule, names, weights, base is not None)
    _check_statistics(rule, names, statistics)
    most = None if max_shard_size is None else parse_size(max_shard_size)
    output = check_writable(output, replaces=None)
    stored_as = _dtype(dtype)
    inputs = check_checkpoints(folders, base, names, vocabulary)
    measured = read_statistics(rule.statistic, statistics, inputs) if rule.statistic is not None else []
    entries = [_entry(inputs, name, stored_as) for name in inputs.names]
    shards = by_file(entries, inputs.origin.file_of) if most is None else by_size(entries, most)
    plan = {
        "rule": rule.name, "options": rule.model_dump(mode="json"), "weights": weights, "names": names, "seed": seed,
        "vocabulary": vocabulary, "base": base is not None,
        "models": [model.fingerprint for model in inputs.models], "base model": inputs.origin.fingerprint,
        "statistics": [found.fingerprint for found in measured],
        "files": {shard.file: [[e.name, str(e.dtype)] for e in shard.entries] for shard in shards},
        "isotune": __version__, "torch": torch.__version__,
    }  # fmt: skip
    unfinished = Unfinished(output)
    total = sum(entry.nbytes for entry in entries)
    rescales = type(rule).rescale is not Rule.rescale
    scratch = sum(4 * math.prod(e.shape) for e in entries if e.name in inputs.merged) if rescales else 0
    refuse(no_space(output.absolute().parent, total + scratch - unfinished.written))
    passes = 1 + rescales + (type(rule).survey is not Rule.survey)
    with (
        unfinished.opened(plan, resume),
        counting("merging", passes * total, progress) as advance,
    ):
        merging = Tensorwise(inputs, measured, rule, weights, seed, shards, unfinished, advance)
        merging.run_to_end()
        write_index(unfinished.model, shards)
        _copy_companions(inputs.origin.folder, unfinished.model, stored_as, bool(inputs.untied))
        record = MergedModel(
            path=output,
            rule=rule.name,
            options=rule.model_dump(mode="json"),
            models=dict(zip(names, weights, strict=True)),
            folders=[str(folder) for folder in folders],
            base=None if base is None else str(base),
            seed=seed,
            vocabulary=vocabulary,
            notes=list(inputs.notes),
            tensors=len(entries),
            changed=sum(merged is not None for merged in unfinished.done.tensors.values()),
            parameters=sum(math.prod(entry.shape) for entry in entries),
            bytes=total,
            factor=merging.run.factor,
        )
        record.write(unfinished.model)
    return record


def _weights(rule: Rule, names: Sequence[str], weights: Sequence[float] | None, has_base: bool) -> list[float]:
    """The weights, once it is clear that the rule can take these models with or without a base."""
    if not has_base and not rule.linear:
        raise OptionError(
            f"the rule {rule.name!r} works on what changed since pretraining; name the pretrained model with "
            "base=... (--base)"
        )
    if weights is None:
        return [1.0 if has_base else 1.0 / len(names)] * len(names)
    if not has_base and abs(sum(weights) - 1) > 1e-6:
        raise OptionError(
            f"without a base the weights must sum to 1, and {list(weights)} sum to {sum(weights):g}; change them, or "
            "name the pretrained model with base=... (--base)"
        )
    return [float(weight) for weight in weights]


def _check_statistics(rule: Rule, names: Sequence[str], statistics: Sequence[str | Path] | None) -> None:
    if rule.statistic is not None and statistics is not None and len(statistics) != len(names):
        raise OptionError(
            f"the rule {rule.name!r} needs a statistic of every weight ({rule.statistic}): give statistics=..., one "
            f"safetensors file for each of the {len(names)} models"
        )
    if rule.statistic is None and statistics is not None:
        raise OptionError(f"the rule {rule.name!r} uses no statistics; leave them out")


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise OptionError(f"dtype {name!r} is not usable; choose from {', '.join(DTYPES)}")
    return None if dtype is None else DTYPES[name]


def _entry(inputs: ModelInputs, name: str, stored_as: torch.dtype | None) -> Entry:
    header = inputs.origin.headers[name]
    assert header.dtype is not None
    return Entry(name, stored_as if stored_as and header.floating else header.dtype, header.shape)


def _copy_companions(origin: Path, folder: Path, stored_as: torch.dtype | None, untied: bool) -> None:
    """Copy the config, the tokenizer and the like, and of a sentence-transformers model the folders of its parts.

    The config then says the dtype, where that is another, and that the head is not tied, where it is not.
    """
    for file in origin.iterdir():
        if file.is_file() and file.suffix in _COMPANIONS and not _OF_TRAINING.fullmatch(file.name):
            shutil.copyfile(file, folder / file.name)
    if (origin / "modules.json").is_file():
        for part in json.loads((origin / "modules.json").read_text(encoding="utf-8")):
            if part["path"] and (origin / part["path"]).is_dir():
                shutil.copytree(origin / part["path"], folder / part["path"], dirs_exist_ok=True)
    if stored_as is not None or untied:
        config = json.loads((folder / MODEL_CONFIG).read_text(encoding="utf-8"))
        if stored_as is not None:
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(stored_as).removeprefix("torch.")
        if untied:
            for part in (config, config.get("text_config")):
                if part is config or (part and "tie_word_embeddings" in part):
                    part["tie_word_embeddings"] = False
        (folder / MODEL_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
