"""The table of methods, found by probing each one on small layers; nothing in it is typed in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from isotune.adapters.registry import method_class, method_names
from isotune.adapters.settings import NotInPEFTError, Settings
from isotune.adapters.shared import Shared
from isotune.sites import AdaptedSite, Site, require_site

_IN, _OUT = 384, 320


@dataclass(frozen=True)
class MethodInfo:
    """One method with its default options."""

    name: str
    equation: str
    """First line of the settings' docstring."""
    parameters: str
    """Trainable parameters at a layer with W of shape (n_out, n_in)."""
    kinds: list[str]
    """The kinds of layer that it adapts."""
    identity_at_start: bool
    """Whether a fresh adapter leaves the output as it was (to 1e-5)."""
    lora_rank: str | None
    """The rank of its exact LoRA form, None where it has none; "full" for that of the layer's smaller side."""
    peft: bool
    """Whether PEFT loads it."""
    learning_rate: float
    """A rate to start from, for AdamW."""
    options: dict[str, str]
    """What each option means."""


def methods() -> list[MethodInfo]:
    """The catalogue: every method that is installed, with what probing it shows."""
    return [_probe(method_class(name)) for name in method_names()]


def _probe(kind: type[Settings]) -> MethodInfo:
    settings = kind()
    site = require_site(nn.Linear(_IN, _OUT), "probe")
    adapter = settings.build(site, torch.Generator().manual_seed(0))
    if shared := settings.shared([site]):
        adapter.share(Shared(shared))
    x = torch.randn(4, _IN, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        identity = torch.allclose(AdaptedSite(site, adapter)(x), site(x), atol=1e-5)
        factors = adapter.factors(site.weight)
    return MethodInfo(
        name=kind.name,
        equation=(kind.__doc__ or "").strip().splitlines()[0],
        parameters=kind.formula,
        kinds=[name for name, layer in _layers().items() if _builds(settings, require_site(layer, name))],
        identity_at_start=identity,
        lora_rank=_rank_in_words(factors[0].shape[1], settings) if factors else None,
        peft=_in_peft(settings),
        learning_rate=kind.learning_rate,
        options={name: field.description or "" for name, field in kind.model_fields.items()},
    )


def _layers() -> dict[str, nn.Module]:
    from transformers.pytorch_utils import Conv1D

    return {
        "linear": nn.Linear(_IN, _OUT),
        "conv1d": Conv1D(_OUT, _IN),
        "conv2d": nn.Conv2d(_IN, _OUT, 3),
        "embedding": nn.Embedding(_IN, _OUT),
    }


def _builds(settings: Settings, site: Site) -> bool:
    return site.kind in settings.kinds and settings.build(site, torch.Generator()) is not None


def _in_peft(settings: Settings) -> bool:
    try:
        return bool(settings.peft_config({"probe": settings}))
    except NotInPEFTError:
        return False


def _rank_in_words(rank: int, settings: Settings) -> str:
    if rank == min(_IN, _OUT):
        return "full"
    own = getattr(settings, "rank", None)
    return f"{rank // own} rank" if own and rank % own == 0 and rank != own else "rank" if rank == own else str(rank)
