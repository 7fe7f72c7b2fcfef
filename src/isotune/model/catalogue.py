"""The table of methods, found by probing each one on small layers; nothing in it is typed in."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from isotune.adapted_site import AdaptedSite
from isotune.adapters.contract import Adapter
from isotune.adapters.peft.dialect import NotInPEFTError, dialect_of
from isotune.adapters.registry import method_class, method_names
from isotune.adapters.settings import Settings
from isotune.errors import IsotuneError, OptionError
from isotune.model.attach import build_adapters
from isotune.sites import CONVOLUTIONS, NORM, LinearSite, Site, site_of

_SIZES = ((64, 96), (128, 128), (256, 256), (1024, 1024))
"""(in, out) of the layers to probe on; the first that a method's default options fit is used."""

KINDS = ("linear", "gpt2_conv1d", "conv1d", "conv2d", "conv3d", "embedding", "norm", "block")
Built = tuple[Site, Adapter]


@dataclass(frozen=True)
class MethodInfo:
    """One method with its default options; what could not be probed is None."""

    name: str
    equation: str
    """First line of the settings' docstring."""
    parameters: str
    """Trainable parameters at a layer with W of shape (n_out, n_in)."""
    trainable: int | None
    """Trainable parameters on all the layers asked for; None where none were, or where the method fits not all."""
    misfit: str | None
    """Why it does not fit the layers asked for."""
    kinds: list[str]
    """The kinds of layer that it adapts."""
    identity_at_start: bool | None
    """Whether a fresh adapter leaves the output as it was (to 1e-5)."""
    foldable: bool | None
    """Whether a changed adapter is all in the weight and the bias that it gives the layer."""
    lora_rank: str | None
    """The rank of its exact LoRA form ("full": the smaller side of the layer), None where it has none."""
    peft: bool
    """Whether PEFT loads it."""
    learning_rate: float
    """A rate to start from, for AdamW."""
    options: dict[str, str]
    """What each option means."""


def methods(sites: Mapping[str, Site] | None = None, names: Sequence[str] | None = None) -> list[MethodInfo]:
    """The catalogue: every method that is installed, or those named, with what probing it shows.

    With `sites`, layers by path, it also counts what each method would train on all of them.
    """
    return [probe(method_class(name), sites) for name in names or method_names()]


def linear_site(n_in: int, n_out: int) -> Site:
    """A linear layer of that size, without values. Raises OptionError for a size below 1."""
    if min(n_in, n_out) < 1:
        raise OptionError(f"a layer of {n_in} inputs and {n_out} outputs is not usable; both must be at least 1")
    return LinearSite(nn.Linear(n_in, n_out, device="meta"))


def probe(kind: type[Settings], sites: Mapping[str, Site] | None = None) -> MethodInfo:
    """What one method is, by building it at its default options and looking."""
    settings = kind()
    fitting = {name: pair for name in KINDS if (pair := next(_built(settings, name), None)) is not None}
    pair = next(iter(fitting.values()), None)
    trainable, misfit = _counted(settings, sites or {})
    return MethodInfo(
        name=kind.name,
        equation=(kind.__doc__ or "").strip().splitlines()[0],
        parameters=kind.formula,
        trainable=trainable,
        misfit=misfit,
        kinds=list(fitting),
        identity_at_start=_is_identity(*pair) if pair else None,
        foldable=_is_foldable(*pair) if pair else None,
        lora_rank=_lora_rank(settings, next(iter(fitting))) if pair else None,
        peft=pair is not None and _in_peft(settings, pair[0]),
        learning_rate=kind.learning_rate,
        options={name: field.description or "" for name, field in kind.model_fields.items()},
    )


def _layer(kind: str, n_in: int, n_out: int) -> nn.Module:
    if kind == "gpt2_conv1d":
        from transformers.pytorch_utils import Conv1D

        return Conv1D(n_out, n_in)
    if kind in CONVOLUTIONS:
        return {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}[kind](n_in, n_out, 3, padding=1)
    if kind == "reader":
        return _Reader(n_in)
    if kind in ("linear", "norm"):
        return nn.Linear(n_in, n_out) if kind == "linear" else nn.LayerNorm(n_out)
    return nn.Embedding(n_in, n_out) if kind == "embedding" else nn.Sequential(nn.Linear(n_in, n_out))


class _Reader(nn.Module):
    """A block that reads tokens, or what stands for them, and holds an attention, for methods that need one."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, d)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d, d) for _ in range(3))

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, x: Tensor, attention_mask: None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        """Hidden states (b, n, d) of x, or inputs_embeds, (b, n, d)."""
        v = x if inputs_embeds is None else inputs_embeds
        q, k, v = (project(v)[:, None] for project in (self.q_proj, self.k_proj, self.v_proj))
        return nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]


def _built(settings: Settings, kind: str) -> Iterator[Built]:
    """A layer of the kind with a fresh adapter on it, for each size that the options fit."""
    if kind not in settings.kinds:
        return
    for size, kind_of_layer in itertools.product(_SIZES, (kind, "reader") if kind == "block" else (kind,)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layer = _layer(kind_of_layer, *size).requires_grad_(False)
        try:
            (adapter,) = build_adapters({"probe": layer}, {"probe": settings}, seed=0).values()
        except IsotuneError:
            continue
        site = site_of(layer, {kind})
        if site is not None:
            yield site, adapter.eval()


def _rows(site: Site) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if site.kind == "embedding":
        return torch.randint(site.in_features, (4, 5), generator=generator)
    if site.kind in CONVOLUTIONS:
        return torch.randn(2, site.layer.in_channels, *(5,) * (-1 - site.features), generator=generator)
    return torch.randn(1, 4, site.out_features if site.kind in NORM else site.in_features, generator=generator)


@torch.no_grad()
def _is_identity(site: Site, adapter: Adapter) -> bool:
    x = _rows(site)
    return torch.allclose(AdaptedSite(site, adapter)(x), site(x), atol=1e-5)


@torch.no_grad()
def _is_foldable(site: Site, adapter: Adapter) -> bool:
    """Whether a changed adapter's forward is that of its weight and bias."""
    x = _rows(site)
    try:
        with _changed(adapter):
            dense = site.forward_with(x, adapter.weight(site.weight), adapter.bias(site.bias))
            return torch.allclose(AdaptedSite(site, adapter)(x), dense, rtol=1e-3, atol=1e-3)
    except (IsotuneError, NotImplementedError):
        return False


@contextmanager
def _changed(adapter: Adapter) -> Iterator[None]:
    """The adapter off its start, within the context."""
    start = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    for parameter in adapter.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    try:
        yield
    finally:
        adapter.load_state_dict(start)


def _lora_rank(settings: Settings, kind: str) -> str | None:
    """The rank of W' - W in words, from how it grows with the layer; None where B and A do not say all."""
    pairs = list(itertools.islice(_built(settings, kind), 2))
    ranks = [_exact_rank(*pair) for pair in pairs]
    if None in ranks:
        return None
    if len(set(ranks)) == 1:
        rank, own = ranks[0] or 0, getattr(settings, "rank", None)
        return "rank" if rank == own else f"{rank // own} rank" if own and rank % own == 0 else str(rank)
    sides = [(site.in_features, site.out_features) for site, _ in pairs]
    grown = {"full": [min(pair) for pair in sides], "n_in": [n for n, _ in sides], "n_out": [n for _, n in sides]}
    return next((name for name, sizes in grown.items() if sizes == ranks), f"{ranks[0]} at {sides[0]}")


@torch.no_grad()
def _exact_rank(site: Site, adapter: Adapter) -> int | None:
    try:
        with _changed(adapter):
            factors, W = adapter.factors(site.weight), adapter.weight(site.weight)
            if factors is None or adapter.bias(site.bias) is not site.bias:
                return None
            B, A = factors
            return B.shape[1] if torch.allclose(site.weight + B @ A, W, rtol=1e-3, atol=1e-3) else None
    except (IsotuneError, NotImplementedError):
        return None


def _in_peft(settings: Settings, site: Site) -> bool:
    try:
        dialect = dialect_of(type(settings))
        dialect.config({"probe": settings})
        return bool(dialect.whole) or dialect.refused(site) is None  # the whole model's is refused by some models
    except NotInPEFTError:
        return False


def _counted(settings: Settings, sites: Mapping[str, Site]) -> tuple[int | None, str | None]:
    """Trainable parameters on the sites, or why the method does not fit them; layers alike are built once."""
    if not sites:
        return None, None
    first = {(site.kind, site.shape): (path, site) for path, site in reversed(list(sites.items()))}
    total = settings.shared_count(sites)
    for alike, number in Counter((site.kind, site.shape) for site in sites.values()).items():
        path, site = first[alike]
        if site.kind not in settings.kinds:
            return None, f"it does not adapt {path}, of the kind {site.kind}"
        try:
            total += number * sum(_trained(settings, site))
        except IsotuneError as error:
            return None, f"at {path}: {error}"
    return total, None


def _trained(settings: Settings, site: Site) -> Iterator[int]:
    try:
        settings.check(site)
        adapter = settings.shell(site)
    except (NotImplementedError, RuntimeError):
        # A start that is computed from values, which a layer on the meta device does not have.
        yield settings.parameter_count(site)
        return
    yield from (parameter.numel() for parameter in adapter.parameters())
