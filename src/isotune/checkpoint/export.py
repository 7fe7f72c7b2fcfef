"""Export adapters as one exact LoRA, which anything that serves LoRA loads as it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from isotune.adapted_site import AdaptedSite
from isotune.adapters.contract import Adapter, Rotation
from isotune.adapters.low_rank.lora import lora_tensors
from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.base_record import BaseRecord, task_type
from isotune.checkpoint.card import export_card
from isotune.checkpoint.files import CARD, TENSORS, check_writable, replaced_folder, write_adapter
from isotune.checkpoint.parts import Part, stored_parts
from isotune.checkpoint.read import read_stored
from isotune.checkpoint.save import peft_fields, refused_by_peft, trained_tensors
from isotune.checkpoint.stored import PREFIX, StoredAdapter
from isotune.errors import CheckpointError, NoLowRankFormError, OptionError, TargetError
from isotune.model.adapted import current
from isotune.model.names import adapted_layers, check_one_weight, trained_modules
from isotune.sites import LinearSite, Site, require_site, stored_layer

_PROBES = 16
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
    """`|W + B A - W'| / |W|` of each layer in the Frobenius norm, for B and A as stored."""
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
    base: BaseRecord


def export_lora(
    model: nn.Module | str | Path,
    path: str | Path,
    dtype: str | torch.dtype = "float32",
    rank_multiple: int = 1,
    base: str | Path | None = None,
    task: str | None = None,
) -> Export:
    """Write the active adapters of a model, or the adapter saved in a folder, as one LoRA in PEFT's layout.

    One rank for all layers (zero-padded), `lora_alpha = r`, no bias, no patterns. The residual of
    each layer is measured as stored, and the file is read back and compared. From a folder, one layer of the base at
    a time is in memory.

    Args:
        model: A model with active adapters (stacked ones become one LoRA), or an adapter folder.
        path: The folder to write: absent, empty, or an adapter's.
        dtype: Storage type: float32, float16 or bfloat16.
        rank_multiple: Round the rank up to a multiple of this, for servers that allow certain ranks only.
        base: Only with a folder: the base model's folder or hub id; by default what the adapter's config says.
        task: Only with a folder: the task whose mix of the skills is exported, for methods that mix by task (`poly`).

    Raises:
        NoLowRankFormError: A layer has no exact LoRA form, or none in PEFT's layout; the message says which
            and why.
        TargetError: The weight of a layer is packed and cannot be dequantised.
        CheckpointError: Nothing to export, a base that cannot be read, or a folder that cannot be written.
        OptionError: An unknown dtype or task, or a rank multiple below 1.
    """
    dtype_name = str(dtype).removeprefix("torch.")
    if dtype_name not in DTYPES:
        raise OptionError(f"dtype {dtype_name!r} is not usable; choose from {', '.join(DTYPES)}")
    if rank_multiple < 1:
        raise OptionError(f"rank_multiple={rank_multiple} is not usable; it must be at least 1")
    check_writable(path)
    source = _from_model(model) if isinstance(model, nn.Module) else _from_folder(read_stored(model), base, task)
    for refused, why in source.refused.items():
        raise NoLowRankFormError(f"{refused!r} {why}; isotune export --to merged works for it")
    found = _lora_of(source, DTYPES[dtype_name])
    rank = math.ceil(max(found.ranks.values()) / rank_multiple) * rank_multiple
    tensors = {name: _padded(name, tensor, rank) for name, tensor in found.tensors.items()} | source.trained
    config = {
        "peft_type": "LORA", **peft_fields(found.kinds, source.trained_paths, source.base),
        "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
        "rank_pattern": {}, "alpha_pattern": {}, "init_lora_weights": True,
    }  # fmt: skip
    with replaced_folder(path) as folder:
        write_adapter(folder, config, tensors)
        card = export_card(config, found.residuals, found.ranks, dtype_name, source.trained_paths, source.base.labels)
        (folder / CARD).write_text(card)
        _read_back(folder / TENSORS, tensors)
    return Export(Path(path), rank, found.ranks, found.residuals, dtype_name)


def _from_model(model: nn.Module) -> _Source:
    layers = list(adapted_layers(model))
    if any(layer.isotune.folded for _, layer in layers):
        raise CheckpointError("the adapters are folded into the weights; call unfold before exporting them")
    parts: list[Part] = [(p, require_site(m, p), m.isotune.running()) for p, m in layers if m.isotune.running()]
    for p, _, adapters in parts:
        if none := [adapter.no_weight for adapter in adapters if not adapter.has_weight]:
            raise NoLowRankFormError(f"{p!r} cannot be exported as a LoRA: {none[0]}")
    if not parts:
        raise CheckpointError("there is nothing to export: no adapter is active on any layer of this model")
    check_one_weight(model, "export")
    trained = {p: dict(current(m).state_dict()) for p, m in trained_modules(model) if m.isotune.running()}
    refused = {p: why for p, site, _ in parts if (why := refused_by_peft(site))}
    return _Source(lambda: parts, refused, trained_tensors(trained), sorted(trained), BaseRecord.of(model))


def _from_folder(stored: StoredAdapter, base: str | Path | None, task: str | None) -> _Source:
    name = base or stored.base.name
    if not stored.settings:
        raise CheckpointError(f"there is nothing to export: {stored.path} holds no adapted layer")
    if not name:
        raise CheckpointError(
            f"{stored.path} does not say which base it was made for; name it with base=... (--base)"
        )
    weights = StoredBase(name)
    stored = stored.completed(weights)
    entries = stored.header["sites"] if stored.header else {}
    refused = {p: entry["refused"] for p, entry in entries.items() if "refused" in entry}
    trained = trained_tensors(stored.trained)
    kind = stored.base.task_type or task_type(weights.config().get("architectures") or ())
    record = BaseRecord(str(name), task_type=kind, labels=stored.base.labels)
    return _Source(lambda: stored_parts(stored, weights, task), refused, trained, sorted(stored.trained), record)


@dataclass
class _Lora:
    """The LoRA of every layer, as it will be stored but for the padding."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    residuals: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def _lora_of(source: _Source, dtype: torch.dtype) -> _Lora:
    """One walk over the layers, with one of them in fp32 at a time."""
    found, buffer = _Lora(), _Buffer()
    for p, site, adapters in source.parts():
        _check_bias(p, site, adapters)
        site_fp32 = _in_fp32(p, site, buffer)
        B, A = (t.to(dtype) for t in _factors(p, site_fp32, adapters))
        if not (torch.isfinite(B).all() and torch.isfinite(A).all()):
            raise CheckpointError(f"the change of {p!r} does not fit into {dtype}; export as bfloat16 or float32")
        found.tensors |= {f"{PREFIX}{p}.{key}": t.cpu() for key, t in lora_tensors(B, A, site).items()}
        found.kinds[p], found.ranks[p] = site.kind, B.shape[1]
        found.residuals[p] = _residual(site_fp32, adapters, B, A)
    return found


class _Buffer:
    """Memory for one weight in fp32, used again and again: getting fresh pages takes longer than filling them."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)

    def at_least_fp32(self, W: Tensor) -> Tensor:
        """W itself where it is fp32 or better, otherwise its copy in the buffer, until the next call."""
        if W.dtype in (torch.float32, torch.float64):
            return W
        if self.memory.numel() < W.numel() or self.memory.device != W.device:
            self.memory = torch.empty(0)  # given back before more is asked for
            self.memory = torch.empty(W.numel(), device=W.device)
        return self.memory[: W.numel()].view(W.shape).copy_(W)


def _in_fp32(p: str, site: Site, buffer: _Buffer) -> Site:
    """The same linear map with its weight in fp32 or better."""
    try:
        weight = buffer.at_least_fp32(site.weight)
    except TargetError as error:
        raise TargetError(f"{p!r} cannot be exported: {error}") from None
    if site.rotates_input:
        return LinearSite(stored_layer("linear", weight))
    return require_site(stored_layer(site.kind, site.layout(weight)), p)


def _factors(p: str, site: Site, adapters: list[Adapter]) -> tuple[Tensor, Tensor]:
    """B (out, r) and A (r, in) of a stack of adapters, in fp32 or better: the factors of each, side by side."""
    Bs, As = [], []
    for adapter in adapters:
        pair = adapter.factors(site.weight)
        if pair is None:
            raise NoLowRankFormError(
                f"{p!r} cannot be exported as a LoRA: {adapter.method} has no exact low-rank form; "
                "isotune export --to merged works for it"
            )
        Bs.append(pair[0])
        As.append(pair[1])
        site = AdaptedSite(site, adapter)
    return torch.cat(Bs, dim=1), torch.cat(As, dim=0)


def _check_bias(p: str, site: Site, adapters: list[Adapter]) -> None:
    """Raise NoLowRankFormError where an adapter changes the layer's bias, which is no part of a LoRA."""
    bias = site.bias
    for adapter in adapters:
        changed = adapter.bias(bias)
        if changed is not bias and not (changed is not None and bias is not None and changed.equal(bias)):
            raise NoLowRankFormError(
                f"{p!r} cannot be exported as a LoRA: {adapter.method} changes the layer's bias, too, for which a "
                "LoRA has no place; isotune export --to merged works for it"
            )


def _residual(site: Site, adapters: list[Adapter], B: Tensor, A: Tensor) -> float:
    """`|W + B A - W'| / |W|`, Frobenius: of a linear layer by random rows v, from `v Wᵀ`, else exactly."""
    adapted: Site = site
    for adapter in adapters:
        adapted = AdaptedSite(adapted, adapter)
    W = site.weight
    B, A = B.to(W.dtype), A.to(W.dtype)
    if site.rotates_input:
        # v is white, so that |v E| / |v W| estimates |E| / |W| without W + B A, and without W'.
        v = torch.randn(_PROBES, site.in_features, generator=torch.Generator().manual_seed(0)).to(W)
        scale = site(v)
        error = torch.addmm(scale, v @ A.mT, B.mT) - _output(adapted, adapters, v)
    else:
        scale = W
        error = torch.addmm(W, B, A) - adapted.weight
    return float(error.norm() / scale.norm().clamp_min(1e-30))


def _output(site: Site, adapters: list[Adapter], v: Tensor) -> Tensor:
    """The site's output for the rows v, without dropout, by another way than the factors where there is one."""
    training = [adapter for adapter in adapters if adapter.training]
    for adapter in training:
        adapter.eval()
    # The rows are rotated first: left to itself, a rotation may compute with W U, as its factors do.
    while isinstance(site, AdaptedSite) and isinstance(site.adapter, Rotation) and site.adapter.side == "in":
        v, site = site.adapter.rotate(v, transpose=True), site.base
    with torch.enable_grad():  # without gradients adapters keep what they make of W
        y = site(v).detach()
    for adapter in training:
        adapter.train()
    return y


def _padded(name: str, tensor: Tensor, rank: int) -> Tensor:
    """A LoRA tensor with zeros up to `rank` along its rank: the first dimension of an A, the second of a B."""
    dim = 0 if "lora_A" in name or name.endswith("_A") else 1
    shape = list(tensor.shape)
    shape[dim] = rank - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _read_back(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless the file holds these tensors, bit for bit."""
    with safe_open(file, framework="pt") as opened:
        for name, tensor in tensors.items():
            if not opened.get_tensor(name).equal(tensor.cpu()):
                raise CheckpointError(f"{name} was not written as it should be; the disk may be failing")
