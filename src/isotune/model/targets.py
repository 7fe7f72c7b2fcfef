"""Which layers an adapter goes on: presets found by the model's structure, suffixes, patterns, callables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterable
from inspect import signature
from typing import Any

from torch import nn

from isotune.bare import HOME, bare, bare_class
from isotune.errors import TargetError, nearest
from isotune.matrix import Matrix
from isotune.model.adapted import Trained
from isotune.model.names import base_modules
from isotune.model.parametrized import matrices_by_path
from isotune.sites import LINEAR, NORM, WHAT_CAN_BE_ADAPTED, site_of

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]

PRESETS = ("attention", "query-value", "mlp", "all-linear", "norms", "biased", "blocks", "stack")

_QUERY_OR_VALUE = re.compile(r"(to_|w|attn_)?(q|v|query|value)(_?(proj|lin|layer)\w*)?", re.IGNORECASE)
_CHANNEL_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm)
"""Norms of channels, of convolutional nets; no adapter goes on them, nor do `norms` and `biased` find them."""
_PACKED = re.compile(r"w?qkv\w*|c_attn|query_key_value|in_proj\w*", re.IGNORECASE)


def find_targets(
    model: nn.Module,
    targets: Targets,
    exclude: Targets | None = None,
    trained: Iterable[str] = (),
    kinds: Collection[str] = (),
) -> dict[str, nn.Module]:
    """The layers that `targets` names, by path, without those that `exclude` names or that are inside `trained`.

    Among `kinds` "norm" lets norms count as layers, and "block" any module.

    Raises TargetError where nothing matches (it lists what was there) or a match is no layer that can be adapted.
    """
    layers = _layers(model)
    # What a preset finds is layers only, and a block is a module.
    by_preset = isinstance(targets, str) and targets in PRESETS
    matrices = {} if by_preset or set(kinds) == {"block"} else matrices_by_path(layers)
    matches = _matcher(layers, targets, model, kinds)
    excluded = _matcher(layers, exclude, model, kinds) if exclude is not None else lambda path, module: False
    trained = tuple(trained)
    found = {
        path: module
        for path, module in {**layers, **matrices}.items()
        if path
        and _named(path, module, matches)
        and not _named(path, module, excluded)
        and not any(path == name or path.startswith(f"{name}.") for name in trained)
    }
    if not found:
        raise TargetError(f"targets {targets!r} match no layer of the model. {_what_is_there(layers, targets)}")
    owners = {id(matrix.owner) for matrix in matrices.values() if "block" not in kinds}
    found = {path: module for path, module in found.items() if id(module) not in owners}
    unusable = {path: m for path, m in found.items() if isinstance(m, Trained) or not site_of(m, kinds)}
    if unusable:
        path, module = next(iter(unusable.items()))
        norms = [path for path, module in unusable.items() if isinstance(module, _CHANNEL_NORMS)]
        raise TargetError(
            f"targets {targets!r} match {path!r}, a {bare_class(module).__name__}, which cannot be adapted; what can "
            f"be is {WHAT_CAN_BE_ADAPTED} (plain ones, whose forward is the usual one), and the matrices that other "
            f"modules hold as their own parameters{_in_full(norms)}"
        )
    return found


def _in_full(norms: list[str]) -> str:
    """What to do about norms that no adapter goes on."""
    return f". Norms of channels can be trained in full: train_also={norms[:20]!r}" if norms else ""


def _named(path: str, module: nn.Module, matches: Callable[[str, nn.Module], bool]) -> bool:
    """Whether a target names the layer; of a matrix also the whole parameter, or the module that owns it."""
    if not isinstance(module, Matrix):
        return matches(path, module)
    parameter = path if module.index is None else path.rpartition(".")[0]
    owner = parameter.rpartition(".")[0]
    return matches(path, module) or matches(parameter, module) or (bool(owner) and matches(owner, module.owner))


def matching(layers: dict[str, nn.Module], targets: Targets, model: nn.Module) -> list[str]:
    """The paths among `layers` that `targets` names. Raises TargetError where it names none."""
    matches = _matcher(layers, targets, model)
    paths = [path for path, module in layers.items() if _named(path, module, matches)]
    if not paths:
        raise TargetError(f"override {targets!r} matches none of the target layers: {_some(layers)}")
    return paths


def find_modules(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules with the given paths or path suffixes. Raises TargetError for a name that matches none."""
    modules = dict(base_modules(model))
    found: dict[str, nn.Module] = {}
    for name in names:
        paths = [path for path in modules if path and (path == name or path.endswith(f".{name}"))]
        if not paths:
            known = [path for path in modules if path and path.count(".") <= 1]
            raise TargetError(f"train_also names {name!r}, which is no module.{nearest(name, known)} {_some(known)}")
        found.update({path: modules[path] for path in paths})
    return found


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by path; one that stands in several places has its first path only."""
    first: dict[int, str] = {}
    return {
        path: module
        for path, module in base_modules(model)
        if first.setdefault(id(module), path) == path and not isinstance(module, Matrix)
    }


def _matcher(
    layers: dict[str, nn.Module], targets: Targets, model: nn.Module, kinds: Collection[str] = ()
) -> Callable[[str, nn.Module], bool]:
    if callable(targets):
        return targets
    if isinstance(targets, str):
        if targets in PRESETS:
            chosen = _preset(layers, targets, model)
            if set(kinds) == {"block"} and targets in ("attention", "mlp"):
                chosen = _around(chosen, targets, layers)
            return lambda path, module: path in chosen
        if re.fullmatch(r"[\w.\-]+", targets) is None:
            try:
                pattern = re.compile(targets)
            except re.error as error:
                raise TargetError(f"targets {targets!r} is no valid regular expression: {error}") from None
            return lambda path, module: pattern.fullmatch(path) is not None
        targets = [targets]
    suffixes = tuple(targets)
    return lambda path, module: any(path == s or path.endswith(f".{s}") for s in suffixes)


def _preset(layers: dict[str, nn.Module], preset: str, model: nn.Module) -> set[str]:
    if preset == "blocks":
        return {path for path in layers if _is_stack(layers.get(path.rpartition(".")[0]))}
    if preset == "stack":
        stacks = {path for path, module in layers.items() if path and _reads_tokens(module)}
        return {path for path in stacks if not any(other.startswith(f"{path}.") for other in stacks)}
    if preset == "norms":
        return {path for path, module in layers.items() if _is_norm(module)}
    linear = _linear_layers(layers, model)
    if preset == "biased":
        norms = {path for path, module in layers.items() if _is_norm(module) and _in_blocks(path, layers)}
        return {path for path in linear | norms if bare(layers[path], "bias") is not None}
    attention = {path for path in linear if _in_attention(path, layers)}
    if preset == "attention":
        return attention
    if preset == "query-value":
        return {path for path in attention if _QUERY_OR_VALUE.fullmatch(path.rpartition(".")[2])}
    return linear - attention if preset == "mlp" else linear


def _around(linear: set[str], preset: str, layers: dict[str, nn.Module]) -> set[str]:
    """In each repeated block the module around all of these layers of it."""
    inside: dict[str, list[list[str]]] = {}
    for path in sorted(linear):
        blocks = [p for p in _parents(path) if _is_stack(layers.get(p.rpartition(".")[0]))]
        inside.setdefault(blocks[-1] if blocks else "", []).append(path.split(".")[:-1])
    around = {block: ".".join(_common(parents)) for block, parents in inside.items()}
    if lost := [block for block, path in around.items() if path == block]:
        raise TargetError(
            f"targets {preset!r}: no one module in {lost[0] or 'the model'!r} holds all the layers of its {preset}; "
            f"name {_instead(linear, preset, lost[0], layers)}, or take 'blocks'"
        )
    return set(around.values())


def _instead(linear: set[str], preset: str, block: str, layers: dict[str, nn.Module]) -> str:
    """What to name where no module in a block holds all: each attention, or the last that its MLP is made of."""
    start = f"{block}." if block else ""
    within = [path.removeprefix(start) for path in layers if path in linear and path.startswith(start)]
    names = list(dict.fromkeys(path.partition(".")[0] for path in within))
    if preset == "attention":
        return f"each of them, targets={names!r}"
    own = [path.rpartition(".")[0] for path in layers if path.endswith(f".{names[-1]}")]
    if all(_is_stack(layers.get(parent.rpartition(".")[0])) for parent in own):
        return f"the last of them, targets={names[-1:]!r}"
    pattern = re.sub(r"\d+", r"\\d+", f"{start}{names[-1]}".replace(".", r"\."))  # more than one is called so
    return f"the last of them, targets=r'{pattern}'"


def _common(paths: list[list[str]]) -> list[str]:
    """The parts with which all of these paths begin."""
    return [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]


def _linear_layers(layers: dict[str, nn.Module], model: nn.Module) -> set[str]:
    """The linear layers of the repeated blocks; in a model without blocks, all but the last, which is its head."""
    linear = [path for path, module in layers.items() if _is_linear(module)]
    in_blocks = [path for path in linear if _in_blocks(path, layers)]
    head = _output_head(model)
    chosen = in_blocks or (linear[:-1] if len(linear) > 1 else linear)
    return {path for path in chosen if head is None or layers[path] is not head}


def _is_linear(module: nn.Module) -> bool:
    site = site_of(module)
    return site is not None and site.kind in LINEAR


def _reads_tokens(module: nn.Module) -> bool:
    """Whether it turns token ids, or what stands for them, and a mask into hidden states."""
    return {"inputs_embeds", "attention_mask"} <= signature(bare_class(module).forward).parameters.keys()


def _is_norm(module: nn.Module) -> bool:
    site = site_of(module, NORM)
    return site is not None and site.kind in NORM


def _output_head(model: nn.Module) -> nn.Module | None:
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else None


def _parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]


def _in_blocks(path: str, layers: dict[str, nn.Module]) -> bool:
    return any(_is_stack(layers[parent]) for parent in _parents(path))


def _is_stack(module: nn.Module | None) -> bool:
    """Whether its children are blocks: a ModuleList, or a Sequential of two or more of one class, none a layer."""
    if not isinstance(module, nn.Sequential):
        return isinstance(module, nn.ModuleList)
    blocks = [child for name, child in module._modules.items() if name != HOME and child is not None]
    have_parts = all(block._modules and site_of(block) is None for block in blocks)
    return len(blocks) > 1 and have_parts and len({bare_class(block) for block in blocks}) == 1


def _in_attention(path: str, layers: dict[str, nn.Module]) -> bool:
    return any(
        re.search(r"attn|attention", parent.rpartition(".")[2], re.IGNORECASE)
        or re.search(r"attention|attn$", type(layers[parent]).__name__, re.IGNORECASE)
        for parent in _parents(path)
    )


def _what_is_there(layers: dict[str, nn.Module], targets: Targets) -> str:
    adaptable = [path for path, module in layers.items() if site_of(module) is not None]
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in adaptable))
    matrices = matrices_by_path(layers).values()
    parameters = list(dict.fromkeys(matrix.name for matrix in matrices if isinstance(matrix, Matrix)))
    if not names and not parameters:
        return f"It has no layer that can be adapted ({WHAT_CAN_BE_ADAPTED})."
    if targets == "stack":
        return (
            "It is one itself, or reads no token ids: open it with a head on it, with AutoModelForCausalLM or the "
            "like, or name the module that takes attention_mask and inputs_embeds."
        )
    in_attention = [path.rpartition(".")[2] for path in adaptable if _in_attention(path, layers)]
    packed = [name for name in (*in_attention, *parameters) if _PACKED.fullmatch(name)]
    if targets == "query-value" and packed:
        return (
            f"Query, key and value are one matrix here: name it, targets={packed[:1]!r}, or take the preset "
            f"'attention'. Adaptable layers end in: {_listed(names)}."
        )
    whole = [path for path, module in layers.items() if isinstance(module, _CHANNEL_NORMS)]
    if targets in ("norms", "biased") and whole:
        return f"Adaptable layers end in: {_listed(names)}{_in_full(whole)}."
    asked = [targets] if isinstance(targets, str) else [] if callable(targets) else list(targets)
    known = [name for name in (*PRESETS, *names, *parameters) if name not in asked]
    hint = next((found for word in asked if (found := nearest(word, known))), "")
    held = f" Parameters that can be adapted: {_listed(parameters)}." if parameters else ""
    return f"Adaptable layers end in: {_listed(names)}.{held}{hint} Presets: {', '.join(PRESETS)}."


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:20])}{', ...' if len(names) > 20 else ''}" or "none"


def _some(paths: Iterable[str]) -> str:
    paths = list(paths)
    return f"There are: {', '.join(paths[:12])}{', ...' if len(paths) > 12 else ''}."
