"""Write an adapter in PEFT's layout, so that PEFT loads it wherever PEFT has the method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.peft.dialect import NotInPEFTError, dialect_of
from isotune.adapters.registry import method_class
from isotune.adapters.settings import Settings
from isotune.checkpoint.base_record import BaseRecord
from isotune.checkpoint.card import adapter_card
from isotune.checkpoint.files import CARD, FORMAT, replaced_folder, write_adapter
from isotune.checkpoint.stored import FULL, MODEL, PREFIX, State, own_type
from isotune.checkpoint.unsaved import warn_of_unsaved
from isotune.errors import CheckpointError
from isotune.matrix import Matrix
from isotune.model.attach import site_for
from isotune.model.names import adapted_layers, trained_modules
from isotune.model.switch import active_names, adapter_names
from isotune.sites import CONVOLUTIONS, Site
from isotune.version import __version__


def save(model: nn.Module, path: str | Path, name: str | None = None, base_model: str | None = None) -> Path:
    """Write one adapter of the model to the folder `path`: all or nothing, whatever happens meanwhile.

    Args:
        model: A model with adapters.
        path: The folder; it may be absent, empty, or hold an older adapter, which is then replaced.
        name: Which adapter; may be left out where the model has one, or one active.
        base_model: Name or path of the base for the config; by default what the model's own config says.

    Returns:
        The folder.

    Raises:
        CheckpointError: No such adapter, a folder that is not an adapter's, no permission, or a full disk.
    """
    name = name or _only_adapter(model)
    parts = {
        p: (site_for(layer, p, own := layer.isotune.settings[name]), own, cast(Adapter, layer.isotune[name]))
        for p, layer in adapted_layers(model)
        if name in layer.isotune
    }
    trained = {p: dict(m.isotune[name].state_dict()) for p, m in trained_modules(model) if name in m.isotune}
    if not parts and not trained:
        raise CheckpointError(
            f"the model has no adapter {name!r}; it has: {', '.join(adapter_names(model)) or 'none'}"
        )
    folder = write_parts(path, parts, trained, BaseRecord.of(model, base_model))
    warn_of_unsaved(model)
    return folder


def write_parts(
    path: str | Path,
    parts: Mapping[str, tuple[Site, Settings, Adapter]],
    trained: State,
    base: BaseRecord,
    sites: Mapping[str, Mapping[str, Any]] | None = None,
    refused: str | None = None,
    files: Mapping[str, str | None] | None = None,
) -> Path:
    """Write an adapter to the folder `path` as `save` does, with or without a model.

    Args:
        path: The folder; it may be absent, empty, or hold an older adapter, which is then replaced.
        parts: By layer path the bare site, the settings and the adapter; all of one method.
        trained: By module path the tensors of the modules trained in full.
        base: What is known of the base.
        sites: Where the sites were rebuilt from a stored adapter, what its header says of them. A rebuilt site has
            lost which expert it is, for one, and the groups of a convolution.
        refused: Why PEFT would not load it, where that is known beforehand.
        files: Text files to write beside the adapter, by name; None for one that is not to stay of an older adapter.

    Raises:
        CheckpointError: A folder that is not an adapter's, no permission, or a full disk.
    """
    settings = {p: own for p, (_, own, _) in parts.items()}
    entries = {p: _entry(site, own, (sites or {}).get(p)) for p, (site, own, _) in parts.items()}
    config, reason = _config(parts, entries, list(trained), base, refused)
    tensors = {
        f"{PREFIX}{p}.{key}": tensor
        for p, (site, _, adapter) in parts.items()
        for key, tensor in adapter.peft_state(site).items()
    }
    # All layers have the same; one of them tells.
    for shared in [adapter.shared for _, own, adapter in parts.values() if own.stores_shared][:1]:
        tensors |= {f"{MODEL}{key}": _compact(tensor) for key, tensor in shared.tensors().items()}
    tensors |= trained_tensors(trained)
    files = files or {}
    with replaced_folder(path, without=files) as folder:
        write_adapter(folder, config, tensors, _header(settings, entries, list(trained), base))
        (folder / CARD).write_text(adapter_card(config, settings, tensors, reason, base.labels))
        for file, text in files.items():
            if text is not None:
                (folder / file).write_text(text, encoding="utf-8")
    return Path(path)


def _compact(tensor: Tensor) -> Tensor:
    """The tensor in the smallest dtype that loses nothing: some random matrices are drawn in bfloat16."""
    for dtype in (torch.bfloat16, torch.float32):
        if tensor.to(dtype).to(tensor.dtype).equal(tensor):
            return tensor.to(dtype)
    return tensor


def trained_tensors(trained: State) -> dict[str, Tensor]:
    """The tensors of modules trained in full, under PEFT's names."""
    return {f"{PREFIX}{p}.{key}": tensor for p, found in trained.items() for key, tensor in found.items()}


def _only_adapter(model: nn.Module) -> str:
    names, active = adapter_names(model), active_names(model)
    if len(names) == 1 or len(active) == 1:
        return names[0] if len(names) == 1 else active[0]
    raise CheckpointError(
        f"the model has the adapters {', '.join(names)}; say which one to save, as name=..."
        if names
        else "the model has no adapter to save; call isotune.adapt first"
    )


def peft_fields(kinds: dict[str, str], trained: list[str], base: BaseRecord) -> dict[str, Any]:
    """The fields of PEFT's config that every method has."""
    fields: dict[str, Any] = {
        "base_model_name_or_path": base.name,
        "inference_mode": True,
        "target_modules": sorted(kinds),
        "modules_to_save": sorted(trained) or None,
        "task_type": base.task_type,
    }
    if "gpt2_conv1d" in kinds.values():
        fields["fan_in_fan_out"] = True
    return fields


def _config(
    parts: Mapping[str, tuple[Site, Settings, Adapter]],
    entries: Mapping[str, dict[str, Any]],
    trained: list[str],
    base: BaseRecord,
    reason: str | None,
) -> tuple[dict[str, Any], str | None]:
    """The adapter's config and, where PEFT cannot load it, why; `reason` where that is known beforehand."""
    settings = {p: own for p, (_, own, _) in parts.items()}
    method = method_class(next(iter(settings.values())).name) if settings else None
    common = peft_fields({p: entry["kind"] for p, entry in entries.items()}, trained, base)
    if method is not None and reason is None:
        dialect = dialect_of(method)
        try:
            for p, (site, own, _) in parts.items():
                if why := entries[p].get("refused") or dialect.refused(site) or dialect.differs(own, site):
                    raise NotInPEFTError(f"{p} {why}")
            if dialect.whole:
                raise NotInPEFTError("in PEFT all layers are one tensor: isotune export --to peft writes it")
            return {"peft_type": dialect.peft_type, **common, **dialect.config(settings)}, None
        except NotInPEFTError as error:
            reason = str(error)
    return {
        "peft_type": own_type(method.name if method else FULL),
        **common,
    }, reason or "it has no adapted layer"


def refused_by_peft(site: Site) -> str | None:
    """Why PEFT's adapters would refuse this layer or compute something else on it; None where they would not."""
    if not site.called and not isinstance(site.layer, Matrix):
        return "is read by nn.MultiheadAttention and never called, so that PEFT's adapter on it would do nothing"
    if isinstance(site.layer, Matrix):
        return "is a parameter and no layer, which PEFT does not adapt in this form"
    if site.kind not in CONVOLUTIONS:
        return None
    conv: Any = site.layer
    if conv.groups != 1:
        return f"is a convolution with groups={conv.groups}, which PEFT does not adapt in this form"
    if max(conv.dilation) > 1 or conv.padding_mode != "zeros":
        return "is a convolution whose dilation or padding mode PEFT ignores"
    return None


def _entry(site: Site, settings: Settings, stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the header says of a site beside its settings; `stored` is what it said when the site was saved before."""
    if stored is not None:
        return {key: value for key, value in stored.items() if key != "settings"}
    entry, dialect = site.entry(), dialect_of(type(settings))
    if why := refused_by_peft(site):
        entry["refused"] = why
    elif dialect.whole and (why := dialect.refused(site)):
        entry["not_in_peft"] = why  # which a folder can say alone, for PEFT's form is made of it later
    return entry


def _header(
    settings: dict[str, Settings], entries: Mapping[str, dict[str, Any]], trained: list[str], base: BaseRecord
) -> dict[str, Any]:
    options = {path: s.model_dump(exclude_defaults=True) for path, s in settings.items()}
    common = next(iter(options.values()), {})
    return {
        "format": FORMAT,
        "isotune": __version__,
        "method": next(iter(settings.values())).name if settings else FULL,
        "settings": common,
        "sites": {
            path: entry if options[path] == common else {**entry, "settings": options[path]}
            for path, entry in entries.items()
        },
        "trained": sorted(trained),
        "base_config": base.config,
        "labels": base.labels,
    }
