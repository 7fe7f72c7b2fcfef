"""Export adapters as one exact LoRA, which anything that serves LoRA loads as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.low_rank.lora import lora_tensors
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.card import export_card
from isotune.checkpoint.files import CARD, TENSORS, check_writable, replaced_folder, write_adapter
from isotune.checkpoint.parts import Part, stored_parts
from isotune.checkpoint.save import base_model_name, peft_fields, refused_by_peft, trained_tensors
from isotune.checkpoint.stored import PREFIX, StoredAdapter, read_stored
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError, TargetError
from isotune.linalg.householder import at_least_fp32
from isotune.model.layers import adapted_layers, trained_modules
from isotune.sites import AdaptedSite, Site

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """What `export_lora` wrote."""

    path: Path
    rank: int
    """The rank of every layer in the file."""
    ranks: dict[str, int]
    """The rank of each layer's exact form, before zero-padding."""
    residuals: dict[str, float]
    """`|W + B A - W'| / |W|` of each layer in the Frobenius norm, read back from the file."""
    dtype: str

    @property
    def residual(self) -> float:
        """The largest residual."""
        return max(self.residuals.values())


@dataclass(frozen=True)
class _Source:
    """What is exported; `parts` can be walked again and again, and holds one layer of the base at a time."""

    parts: Callable[[], Iterable[Part]]
    refused: dict[str, str]
    trained: dict[str, Tensor]
    trained_paths: list[str]
    base_model: str | None


def export_lora(
    model: nn.Module | str | Path,
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    rank_multiple: int = 1,
    base: str | Path | None = None,
) -> Export:
    """Write the active adapters of a model, or the adapter saved in a folder, as one LoRA in PEFT's layout.

    One rank for all layers (zero-padded), `lora_alpha = r`, no bias, no patterns. The folder is read back and
    compared with the adapted weights. From a folder, one layer of the base at a time is in memory.

    Args:
        model: A model with active adapters (stacked ones become one LoRA), or an adapter folder.
        path: The folder to write: absent, empty, or an adapter's.
        dtype: Storage type: float32, float16 or bfloat16.
        rank_multiple: Round the rank up to a multiple of this, for servers that allow certain ranks only.
        base: Only with a folder: the base model's folder or hub id; by default what the adapter's config says.

    Raises:
        NoLowRankFormError: A layer has no exact LoRA form, or none in PEFT's layout; the message says which
            and why.
        TargetError: The weight of a layer is packed and cannot be dequantised.
        CheckpointError: Nothing to export, a base that cannot be read, or a folder that cannot be written.
        OptionError: An unknown dtype, or a rank multiple below 1.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise OptionError(f"dtype {dtype_name!r} is not usable; choose from {', '.join(DTYPES)}")
    if rank_multiple < 1:
        raise OptionError(f"rank_multiple={rank_multiple} is not usable; it must be at least 1")
    check_writable(path)
    source = _from_model(model) if isinstance(model, nn.Module) else _from_folder(read_stored(model), base)
    for refused, why in source.refused.items():
        raise NoLowRankFormError(f"{refused!r} {why}; isotune export --to merged works for it")
    tensors, ranks, rank = _tensors(source, DTYPES[dtype_name], rank_multiple)
    sites = {p: site for p, site, _ in source.parts()}
    config = {
        "peft_type": "LORA", **peft_fields(sites, source.trained_paths, source.base_model),
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
    }  # fmt: skip
    with replaced_folder(path) as folder:
        write_adapter(folder, config, tensors | source.trained)
        residuals = _read_back(folder / TENSORS, source)
        (folder / CARD).write_text(export_card(config, residuals, ranks, dtype_name, source.trained_paths))
    return Export(Path(path), rank, ranks, residuals, dtype_name)


def _from_model(model: nn.Module) -> _Source:
    parts: list[Part] = [(p, layer.bare, layer.running()) for p, layer in adapted_layers(model) if layer.running()]
    if not parts:
        raise CheckpointError("there is nothing to export: no adapter is active on any layer of this model")
    if any(layer.folded for _, layer in adapted_layers(model)):
        raise CheckpointError("the adapters are folded into the weights; call unfold before exporting them")
    trained = {p: module.current for p, module in trained_modules(model) if module.running()}
    refused = {p: why for p, site, _ in parts if (why := refused_by_peft(site))}
    return _Source(lambda: parts, refused, trained_tensors(trained), sorted(trained), base_model_name(model))


def _from_folder(stored: StoredAdapter, base: str | Path | None) -> _Source:
    name = base or stored.config.get("base_model_name_or_path")
    if not stored.settings:
        raise CheckpointError(f"there is nothing to export: {stored.path} holds no adapted layer")
    if not name:
        raise CheckpointError(
            f"{stored.path} does not say which base it was made for; name it with base=... (--base)"
        )
    weights = StoredBase(name)
    entries = stored.header["sites"] if stored.header else {}
    refused = {p: entry["refused"] for p, entry in entries.items() if "refused" in entry}
    trained = {f"{PREFIX}{p}.{key}": t for p, found in stored.trained.items() for key, t in found.items()}
    return _Source(lambda: stored_parts(stored, weights), refused, trained, sorted(stored.trained), str(name))


@torch.no_grad()
def _tensors(
    source: _Source, dtype: torch.dtype, rank_multiple: int
) -> tuple[dict[str, Tensor], dict[str, int], int]:
    """The LoRA tensors under PEFT's names, the exact rank of each layer, and the one rank that all are padded to."""
    factors, ranks = {}, {}
    for p, site, adapters in source.parts():
        B, A = _factors(p, site, adapters)
        ranks[p] = B.shape[1]
        factors[p] = B, A
    rank = math.ceil(max(ranks.values()) / rank_multiple) * rank_multiple
    tensors: dict[str, Tensor] = {}
    for p, site, _ in source.parts():
        B, A = factors.pop(p)
        pad = rank - B.shape[1]
        B, A = nn.functional.pad(B, (0, pad)).to(dtype), nn.functional.pad(A, (0, 0, 0, pad)).to(dtype)
        if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
            raise CheckpointError(f"the change of {p!r} does not fit into {dtype}; export as bfloat16 or float32")
        tensors |= {f"{PREFIX}{p}.{key}": tensor for key, tensor in lora_tensors(B, A, site).items()}
    return tensors, ranks, rank


def _factors(p: str, site: Site, adapters: list[Adapter]) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of a stack of adapters, in fp32 or better: the factors of each, side by side."""
    Bs, As = [], []
    for adapter in adapters:
        try:
            pair = adapter.factors(at_least_fp32(site.weight))
        except TargetError as error:
            raise TargetError(f"{p!r} cannot be exported: {error}") from None
        if pair is None:
            raise NoLowRankFormError(
                f"{p!r} cannot be exported as a LoRA: {adapter.method} has no exact low-rank form; "
                "isotune export --to merged works for it"
            )
        Bs.append(pair[0])
        As.append(pair[1])
        site = AdaptedSite(site, adapter)
    return torch.cat(Bs, dim=1), torch.cat(As, dim=0)


@torch.no_grad()
def _read_back(file: Path, source: _Source) -> dict[str, float]:
    residuals = {}
    with safe_open(file, framework="pt") as opened:
        for p, site, adapters in source.parts():
            names = list(lora_tensors(torch.empty(1, 1), torch.empty(1, site.in_features, device="meta"), site))
            A, B = (opened.get_tensor(f"{PREFIX}{p}.{name}").flatten(1).to(torch.float64) for name in names)
            adapted: Site = site
            for adapter in adapters:
                adapted = AdaptedSite(adapted, adapter)
            W = site.weight.cpu().to(torch.float64)
            error = torch.addmm(W - adapted.weight.cpu().to(torch.float64), B, A)
            residuals[p] = float(error.norm() / W.norm().clamp_min(1e-30))
    return residuals
