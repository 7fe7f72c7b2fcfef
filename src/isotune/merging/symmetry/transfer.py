"""Task arithmetic across models: what fine-tuning changed in one model, added to another in that model's basis.

    θ = θ_T + λ (π(θ_skilled) - π(θ_base))

π is the symmetry (symmetry.py) that brings the source, θ_base, closest to the target, θ_T; with none it is plain task
arithmetic ("Editing Models with Task Arithmetic", ICLR 2023, arXiv 2212.04089). Paper: "Leveraging Parameter Space
Symmetries for Reasoning Skill Transfer in LLMs", 2025, arXiv 2511.10850. Folders are read and written one tensor at a
time; an adapter stays of its rank.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from isotune.checkpoint.card import export_card
from isotune.checkpoint.export import export_lora
from isotune.checkpoint.files import CARD, check_writable, read_adapter, replaced_folder, write_adapter
from isotune.checkpoint.stored import PREFIX
from isotune.checkpoint.vocabularies import token_ids
from isotune.errors import CheckpointError, OptionError
from isotune.linalg.low_rank import Factored
from isotune.merging.names import model_names
from isotune.merging.record import MovedSkill
from isotune.merging.symmetry.align import Mode, align
from isotune.merging.symmetry.files import Tensors, rewrite
from isotune.merging.symmetry.maps import Symmetry, architecture
from isotune.quantised import DENSE

_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
_COPIED = {".json", ".txt", ".model", ".jinja"}


@torch.no_grad()
def transfer(
    target: str | Path,
    source_base: str | Path,
    source_skilled: str | Path,
    output: str | Path,
    scale: float = 1.0,
    use: Collection[str] | None = None,
    reference: Literal["base", "skilled"] = "base",
    mode: Mode = "weights",
    tokens: Tensor | None = None,
) -> MovedSkill:
    """Add what made `source_skilled` of `source_base` to the target, in the target's basis, and write the model.

    One tensor of each model is in memory at a time, in fp32; while aligning by weights one half of a block. The
    result has the target's configuration, tokenizer, dtypes and files. Embeddings and head are left as they are where
    the vocabularies differ (in size, or in the tokens of their tokenizers' files).

    Args:
        target: The model to add to: a folder of safetensors files, or a hub id.
        source_base: The model that the skill was trained from; related to the target.
        source_skilled: The model with the skill.
        output: The folder to write; absent or empty.
        scale: λ; values from 0.3 to 1 are usual.
        use: The symmetries to use, as in `align`; none of them, `()`, for plain task arithmetic.
        reference: Which of the two source models is aligned with the target.
        mode: Align by "weights", or by "activations" on `tokens`, for which both models are loaded whole.
        tokens: Token ids (rows, length) for that.

    Raises:
        OptionError: A kind of model or an option that is not known.
        CheckpointError: Models that do not fit each other, or a folder that cannot be read or written.
    """
    if not math.isfinite(scale):
        raise OptionError(f"scale={scale} is not usable; it must be finite")
    if reference not in ("base", "skilled"):
        raise OptionError(f"reference {reference!r} is unknown; choose base or skilled")
    check_writable(output, replaces=None)
    names = model_names([target, source_skilled])
    models = theirs, base, skilled = Tensors(target), Tensors(source_base), Tensors(source_skilled)
    for source in (base, skilled):
        _check_sizes(source, theirs)
    left_out = _left_out(theirs, base, skilled)
    symmetry = _aligned(base if reference == "base" else skilled, theirs, use, mode, tokens)
    record = MovedSkill(
        path=Path(output),
        rule="symmetry",
        options={"scale": scale, "use": use, "reference": reference, "mode": mode},
        models=dict(zip(names, (1.0, scale), strict=True)),
        folders=[str(target), str(source_skilled)],
        base=str(source_base),
        left_out=left_out,
        **_distances(symmetry),
    )
    with replaced_folder(output, replaces=None) as folder:
        for file in sorted(theirs.folder.iterdir()):
            if file.suffix in _COPIED and file.is_file() and not file.name.startswith("pytorch_model"):
                shutil.copyfile(file, folder / file.name)
        for part in sorted(set(theirs.base.file_of.values())):
            shutil.copyfile(theirs.folder / part, folder / part)
            rewrite(folder / part, lambda name: None if name in left_out else _sum(name, *models, symmetry, scale))
        record.write(folder)
    return record


def transfer_adapter(
    adapter: str | Path,
    source_base: str | Path,
    target: str | Path,
    output: str | Path,
    use: Collection[str] | None = None,
    mode: Mode = "weights",
    tokens: Tensor | None = None,
) -> MovedSkill:
    """Move an adapter of one model into the basis of another, as a LoRA of the same rank in PEFT's layout.

    Args:
        adapter: A folder with an adapter of `source_base` that has an exact low-rank form.
        source_base: The model that it was trained on.
        target: The model that it is for: a folder of safetensors files, or a hub id.
        output: The folder to write: absent, empty, or an adapter's. The tensors are float32.
        use: The symmetries to use, as in `align`.
        mode: As in `transfer`.
        tokens: As in `transfer`: shape (rows, length).

    Raises:
        NoLowRankFormError: A layer has no exact LoRA form.
        OptionError: A kind of model or a symmetry that is not known.
        CheckpointError: An adapter with modules trained in full or of layers that the target has not, models that do
            not fit each other, or a folder that cannot be read or written.
    """
    check_writable(output)
    ours, theirs = Tensors(source_base), Tensors(target)
    _check_sizes(ours, theirs)
    with tempfile.TemporaryDirectory() as folder:
        exported = export_lora(adapter, Path(folder) / "lora", base=source_base)
        config, tensors, _ = read_adapter(exported.path)
    if config["modules_to_save"]:
        raise CheckpointError(
            f"{adapter} holds modules trained in full ({', '.join(config['modules_to_save'])}), which are no change "
            "that could be moved; fold it into its base (isotune export --to merged) and transfer the models"
        )
    _check_layers(list(exported.ranks), ours, theirs)
    symmetry = _aligned(ours, theirs, use, mode, tokens)
    for path in exported.ranks:
        names = [f"{PREFIX}{path}.lora_B.weight", f"{PREFIX}{path}.lora_A.weight"]
        if names[0] in tensors:
            moved = symmetry.apply_change(path, Factored(*(tensors[name] for name in names)))
            tensors |= dict(zip(names, moved, strict=True))
    config["base_model_name_or_path"] = str(target)
    record = MovedSkill(
        path=Path(output),
        rule="symmetry",
        options={"use": use, "mode": mode},
        models=dict.fromkeys(model_names([adapter]), 1.0),
        folders=[str(adapter)],
        base=str(target),
        **_distances(symmetry),
    )
    card = export_card(config, exported.residuals, exported.ranks, exported.dtype, [], [])
    with replaced_folder(output) as written:
        write_adapter(written, config, tensors)
        (written / CARD).write_text(
            f"{card}\nTrained on {source_base} and moved into the basis of {target}; the residuals are from before.\n"
        )
        record.write(written)
    return record


def _aligned(
    source: Tensors, target: Tensors, use: Collection[str] | None, mode: Mode, tokens: Tensor | None
) -> Symmetry:
    if mode != "activations":
        return align(source, target, target.config, use, mode, tokens)
    if _differing_vocabulary(source, target):
        raise CheckpointError(
            f"{source.folder} and {target.folder} have different vocabularies, so that the same tokens are different "
            "text; align them by weights"
        )
    from transformers import AutoModelForCausalLM

    ours, theirs = (AutoModelForCausalLM.from_pretrained(own.folder) for own in (source, target))
    return align(ours, theirs, target.config, use, mode, tokens)


def _distances(symmetry: Symmetry) -> dict[str, float]:
    parts = symmetry.distances.values()
    return {key: math.hypot(*(getattr(part, key) for part in parts)) for key in ("before", "after") if parts}


def _check_sizes(source: Tensors, target: Tensors) -> None:
    ours, theirs = vars(architecture(source.config)), vars(architecture(target.config))
    if differing := [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]:
        raise CheckpointError(
            f"{source.folder} and {target.folder} do not fit each other: they have {'; '.join(differing)}. "
            "A skill moves between models of one family and size only"
        )


def _differing_vocabulary(source: Tensors, target: Tensors) -> bool:
    """Whether the embeddings are of other sizes, or the tokenizers have other tokens."""
    if any(n in source and n in target and source.shape(n) != target.shape(n) for n in _VOCABULARY):
        return True
    ours, theirs = token_ids(source.folder), token_ids(target.folder)
    return ours is not None and theirs is not None and ours != theirs


def _left_out(target: Tensors, base: Tensors, skilled: Tensors) -> dict[str, str]:
    """The tensors to which nothing is added. Raises CheckpointError where others do not fit."""
    found, wrong = {}, []
    differing = next((s for s in (base, skilled) if _differing_vocabulary(s, target)), None)
    if not differing and len({"lm_head.weight" in own for own in (target, base, skilled)}) > 1:
        tied = " and ".join(str(own.folder) for own in (target, base, skilled) if "lm_head.weight" not in own)
        raise CheckpointError(
            f"the head is tied to the embeddings (or missing) in {tied}, but not in the others, so that its change "
            "has no place of its own; save all of the models with the head tied or all without"
        )
    models = {"target": target, "source_base": base, "source_skilled": skilled}
    for name in dict.fromkeys([*target, *base, *skilled]):
        shapes = {role: own.shape(name) for role, own in models.items() if name in own}
        if differing and name in _VOCABULARY:
            found[name] = f"the vocabularies of {differing.folder} and {target.folder} differ"
        elif len(shapes) < 3 and name.startswith("layers.") and name.endswith((".weight", ".bias")):
            wrong.append(f"{name} is only in {' and '.join(shapes)}")
        elif len(shapes) < 3:
            found[name] = f"it is only in {' and '.join(shapes)}"
        elif len(set(shapes.values())) > 1:
            wrong.append(f"{name} is " + ", ".join(f"{shape} in {role}" for role, shape in shapes.items()))
    if wrong:
        more = f"; and {len(wrong) - 8} more tensors" if len(wrong) > 8 else ""
        raise CheckpointError(f"the models do not fit each other: {'; '.join(wrong[:8])}{more}")
    return found


def _check_layers(paths: list[str], source: Tensors, target: Tensors) -> None:
    """Raise CheckpointError unless the target has the adapted layers in the same shapes."""
    wrong = []
    for path in paths:
        name = f"{path.removeprefix('model.')}.weight"
        if name in _VOCABULARY and _differing_vocabulary(source, target):
            wrong.append(f"{path} is for another vocabulary")
        elif name not in target:
            wrong.append(f"{path} is missing")
        elif name in source and source.shape(name) != target.shape(name):
            wrong.append(f"{path} is {source.shape(name)} in the source and {target.shape(name)} in the target")
    if wrong:
        raise CheckpointError(f"the adapter does not fit {target.folder}: {'; '.join(wrong)}")


def _sum(
    name: str, theirs: Tensors, ours: Tensors, tuned: Tensors, symmetry: Symmetry, scale: float
) -> Tensor | None:
    """`θ_T + λ π(θ_skilled - θ_base)` in the target's dtype; None where it is θ_T, or no tensor of weights."""
    target, base, skilled = theirs[name], ours[name], tuned[name]
    if any(tensor.dtype not in DENSE for tensor in (target, base, skilled)):
        if not name.endswith((".weight", ".bias")):
            return None  # positions and the like
        raise CheckpointError(f"{name} is stored quantised; transfer unquantised models")
    if skilled.equal(base):
        return None
    exact = torch.float64 if torch.float64 in (target.dtype, base.dtype, skilled.dtype) else torch.float32
    change = symmetry.apply_tensor(name, skilled.to(exact) - base.to(exact))
    found = (target.to(exact) + scale * change).to(target.dtype)
    if not found.isfinite().all():
        raise CheckpointError(f"{name} would hold values that are not finite in {target.dtype}")
    return found
