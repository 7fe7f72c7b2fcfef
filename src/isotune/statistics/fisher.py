"""The diagonal of the Fisher information of adapted weights, per example and exactly where that can be had.

    F = 1/N Σ_n E_{y ~ p(.|x_n)} (∂ log p(y | x_n) / ∂W)²,    ∂/∂W = Σ_t g_t x_tᵀ

g_t is the gradient at the output of the layer, x_t its input, at token t; the sum over the tokens of an example is
taken before the square. Examples of a batch share a backward pass; their gradients are told apart by their rows.

Source: "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, arXiv 2111.09832. Cost: C - 1
backward passes for the exact expectation over C classes, else one, and for each pass 2 t in out flops for each layer
and example. Memory: the inputs and outputs of the layers, and a few examples' gradients of the largest of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from isotune.errors import IsotuneError
from isotune.linalg.precision import at_least_fp32
from isotune.linalg.thin import without_autocast
from isotune.matrix import Matrix
from isotune.model.adapted import Adapted, Trained, current
from isotune.model.batches import arguments_of, batch_bar, evaluating
from isotune.model.names import base_modules, check_one_weight
from isotune.sites import CONVOLUTIONS, Site, device_of, require_site, site_of
from isotune.statistics.likelihood import Expectation, directions, scores_of

_AT_ONCE = 2**24
"""Entries of per-example gradients that are held at a time, or those of one example."""


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    expectation: Expectation = "exact",
    *,
    examples: int | None = None,
    whole_model: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Tensor]:
    """The diagonal Fisher information of the adapted weights W' of a model, where its adapters have taken them.

    The model runs in evaluation mode, with dropout off, and nothing of it is changed. What it returns, or its
    `logits`, are scores of shape (n, classes), or (n, tokens, vocabulary) for a causal language model. There an
    example is a whole sequence: the score at each position is for the next token, and `log p(y | x)` is the sum
    over those positions whose next token is in `labels` (not -100), or else in the `attention_mask`.

    Args:
        model: A model with adapters in use, or any model with `whole_model`.
        batches: What the model is called with, as for `isotune.calibrate`; `labels` are taken out before.
        expectation: Over y. "exact": all classes of a classifier. "sample": one label drawn from the model's own
            p(y | x), for a language model one token at each position, given the true ones before it: unbiased.
            "empirical": the `labels` of the batch, which is not the Fisher information but often used for it.
        examples: How many examples to take; by default all.
        whole_model: All linear and convolutional layers, and their biases, not only adapted ones. Embeddings are left
            out, and of an output layer that shares its weight with one, only its own use of it is measured.
        seed: Of the labels drawn.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Returns:
        By path, in fp32 or better on the CPU, the same for layers that share a weight: (out, in) for an adapted
        layer; for layers of modules trained in full, and of the whole model, in the shape of their weight, with
        `<path>.bias` beside.

    Raises:
        IsotuneError: Nothing to measure, a layer that mixes the examples of a batch, or values that are not finite.
        OptionError: An expectation that the model or the batches do not allow.
    """
    check_one_weight(model, "measure")
    watched = _watched(model, whole_model)
    draw = torch.Generator().manual_seed(seed)
    seen, checked = 0, False
    with evaluating(model), torch.enable_grad(), _hooks(watched), _bar(batches, progress) as advance:
        for batch in batches:
            if examples is not None and seen >= examples:
                break
            args, named = arguments_of(batch, device_of(model))
            labels = named.pop("labels", None)
            logits = scores_of(model(*args, **named))
            n = len(logits)
            if not checked and n > 1:
                _check_apart(watched, logits)
                checked = True
            kept = n if examples is None else min(n, examples - seen)
            turns = directions(logits.detach(), labels, named.get("attention_mask"), expectation, draw)
            for direction, last in turns:
                direction[kept:] = 0
                _add(watched, logits, direction, n, retain=not last)
            for one in watched:
                one.calls.clear()
            seen += kept
            advance()
    if not seen:
        raise IsotuneError("there are no examples to take the Fisher information over; give at least one batch")
    return _means(watched, seen)


@dataclass
class _Watched:
    """A weight, the modules that compute with it, what they saw in this batch, and the sum of squares so far."""

    path: str
    """Where it is first; `others` are the paths of what shares it."""
    site: Site
    adapted: bool
    modules: list[nn.Module]
    others: list[str] = field(default_factory=list)
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    sum: Tensor | None = None
    bias: Tensor | None = None

    def see(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> Tensor:
        """The forward hook: keep input and output, and pass on a copy, which may be altered in place."""
        y = output if output.requires_grad else output.detach().requires_grad_()
        x = args[0] if args else next(iter(named.values()))
        # A copy: a frozen layer's input may be altered in place after it.
        self.calls.append((x.detach().clone(), y))
        return y.clone()

    @property
    def has_own_bias(self) -> bool:
        """Whether there is a bias to measure beside the weight: not where an adapter, or two modules, are on it."""
        return not self.adapted and self.site.bias is not None and len(self.modules) == 1

    def rows(self, x: Tensor, y: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """x as (n, groups, t, in), and y, or its gradient, as (n, groups, t, out / groups)."""
        d = self.site.in_features
        if self.site.kind in CONVOLUTIONS:
            eye = torch.eye(d, dtype=x.dtype, device=x.device)
            groups = int(self.site.layer.groups)
            x = self.site.project(x, eye).reshape(n, groups, d, -1).mT
            return x, y.reshape(n, groups, y.shape[self.site.features] // groups, -1).mT
        if self.site.kind == "embedding":
            return x.reshape(n, 1, -1, 1), y.reshape(n, 1, -1, y.shape[-1])
        return x.reshape(n, 1, -1, d), y.reshape(n, 1, -1, y.shape[-1])

    def add(self, gradients: list[Tensor | None], n: int) -> None:
        """Add the squared gradients of n examples; `gradients` has those at the output of each call."""
        pairs = [
            self.rows(x, gradient, n) for (x, _), gradient in zip(self.calls, gradients, strict=True)
            if gradient is not None
        ]  # fmt: skip
        if not pairs:
            return
        # All calls are tokens of the same weight: their gradients add up before the square.
        x = torch.cat([one for one, _ in pairs], dim=2)
        g = at_least_fp32(torch.cat([other for _, other in pairs], dim=2))
        squares = self._embedded(x, g) if self.site.kind == "embedding" else _squares(g, x.to(g.dtype))
        self.sum = squares if self.sum is None else self.sum.add_(squares)
        if self.has_own_bias:
            bias = g.sum(dim=2).flatten(1).square().sum(dim=0)
            self.bias = bias if self.bias is None else self.bias.add_(bias)

    def _embedded(self, x: Tensor, g: Tensor) -> Tensor:
        """Of an embedding, whose rows of x are one-hot, as indices: (dimension, number of embeddings)."""
        total = g.new_zeros(self.site.in_features, self.site.out_features)
        padding = self.site.layer.padding_idx
        for tokens, own in zip(x[:, 0, :, 0], g[:, 0], strict=True):
            present, place = tokens.unique(return_inverse=True)
            sums = own.new_zeros(len(present), own.shape[-1]).index_add_(0, place, own)
            if padding is not None:
                sums[present == padding] = 0
            total[present] += sums.square()
        return total.mT


def _squares(g: Tensor, x: Tensor) -> Tensor:
    """`Σ_n (Σ_t g_t x_tᵀ)²`, (out, in), for g (n, groups, t, out / groups) and x (n, groups, t, in)."""
    if g.shape[2] == 1:
        total = torch.einsum("ngo,ngi->goi", g[:, :, 0].square(), x[:, :, 0].square())
        return total.flatten(0, 1)
    entries = g.shape[1] * g.shape[3] * x.shape[3]
    size = max(1, _AT_ONCE // max(entries, 1))
    total = g.new_zeros(g.shape[1], g.shape[3], x.shape[3])
    for own_g, own_x in zip(g.split(size), x.split(size), strict=True):
        total += (own_g.mT @ own_x).square_().sum(dim=0)
    return total.flatten(0, 1)


def _watched(model: nn.Module, whole_model: bool) -> list[_Watched]:
    found: dict[int, _Watched] = {}
    for path, module in base_modules(model):
        if isinstance(module, Adapted) and module.isotune.running():
            if isinstance(module, Matrix):
                raise IsotuneError(
                    f"{path!r} is a parameter that its module computes with itself; the gradients of single examples "
                    "cannot be told apart there, so that it has no Fisher information here"
                )
            _watch(found, path, module, require_site(module, path), id(module))
        elif isinstance(module, Trained) and module.isotune.running():
            for name, part in current(module).named_modules():
                _watch_plain(found, f"{path}.{name}" if name else path, part)
        elif whole_model:
            _watch_plain(found, path, module)
    if not found:
        raise IsotuneError(
            "the model has no adapted layers in use, of which to take the Fisher information; put an adapter on it, "
            "or ask for the whole model"
        )
    return list(found.values())


def _watch_plain(found: dict[int, _Watched], path: str, layer: nn.Module) -> None:
    site = site_of(layer)
    if site is None or site.kind == "embedding" or site.packed or isinstance(layer, Matrix):
        return
    _watch(found, path, layer, site, id(site.parameter))


def _adapted(module: nn.Module) -> bool:
    return isinstance(module, Adapted) and bool(module.isotune.running())


def _watch(found: dict[int, _Watched], path: str, module: nn.Module, site: Site, weight: int) -> None:
    one = found.setdefault(weight, _Watched(path, site, _adapted(module), []))
    if path != one.path:
        one.others.append(path)
    if module not in one.modules:
        one.modules.append(module)


@contextmanager
def _hooks(watched: list[_Watched]) -> Iterator[None]:
    handles = [module.register_forward_hook(one.see, with_kwargs=True) for one in watched for module in one.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bar(batches: Iterable[Any], progress: bool) -> Any:
    return batch_bar(batches, 1, progress, "Fisher information")


def _add(watched: list[_Watched], logits: Tensor, direction: Tensor, n: int, retain: bool) -> None:
    gradients = iter(_gradients(watched, logits, direction, retain))
    for one in watched:
        own = [next(gradients) for _ in one.calls]
        with without_autocast(direction), torch.no_grad():
            one.add(own, n)


def _gradients(watched: list[_Watched], logits: Tensor, direction: Tensor, retain: bool) -> list[Tensor | None]:
    outputs = [y for one in watched for _, y in one.calls]
    if not outputs or not logits.requires_grad:
        raise IsotuneError("none of the layers took part in what the model computed on the batch")
    return list(torch.autograd.grad(logits, outputs, direction, retain_graph=retain, allow_unused=True))


def _check_apart(watched: list[_Watched], logits: Tensor) -> None:
    """Raise IsotuneError unless what the first example computes depends on its own rows alone, in every layer."""
    n = len(logits)
    first = torch.zeros_like(logits)
    first[0] = torch.randn(first[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(first)
    gradients = iter(_gradients(watched, logits, first, retain=True))
    for one in watched:
        for (x, _), gradient in [(call, next(gradients)) for call in one.calls]:
            try:
                apart = gradient is None or not one.rows(x, gradient, n)[1][1:].any()
            except RuntimeError:  # rows that cannot be shared out among the examples
                apart = False
            if not apart:
                raise IsotuneError(
                    f"{one.path!r} mixes the examples of a batch, so that their gradients cannot be told apart; "
                    "give batches of one example each"
                )


def _means(watched: list[_Watched], count: int) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for one in watched:
        shape = (one.site.out_features, one.site.in_features)
        mean = torch.zeros(shape) if one.sum is None else (one.sum / count).cpu()
        if not mean.isfinite().all():
            raise IsotuneError(
                f"the Fisher information of {one.path!r} is not finite; look at the data and the model"
            )
        for path in (one.path, *one.others):
            found[path] = mean if one.adapted else one.site.layout(mean).contiguous()
            if one.bias is not None:
                found[f"{path}.bias"] = (one.bias / count).cpu()
    return found
