"""One pass over data that measures what reaches the layers, for methods whose start depends on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.errors import IsotuneError, OptionError
from isotune.linalg.thin import without_autocast
from isotune.model.adapted import Adapted
from isotune.model.batches import arguments_of, batch_bar, evaluating
from isotune.model.names import adapted_layers
from isotune.sites import CONVOLUTIONS, Site, device_of, require_site


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    one_layer_at_a_time: bool = False,
    least_rows: int | None = None,
    progress: bool = True,
) -> nn.Module:
    """Let the active adapters that start from the covariance of their inputs, such as CorDA's, take that start.

    The model runs over the batches as it is in evaluation mode, without gradients; the covariance `XᵀX / n` of each
    layer's inputs is summed in fp32. Rows that an `attention_mask` (b, t) marks as padding do not count.

    Args:
        model: A model with adapters, not yet trained.
        batches: What the model is called with: mappings of keyword arguments, tuples of arguments, or tensors. Of
            text, a few hundred sequences like those that the adapters are for.
        one_layer_at_a_time: Hold one covariance (in x in, fp32) in memory at a time, for as many passes as there are
            layers. `batches` must then be something that can be walked again, such as a list or a DataLoader.
        least_rows: Rows that every layer must have seen; by default as many as it has inputs, because a covariance of
            fewer is singular.
        progress: Whether to show a progress bar, on standard error where that is a terminal.

    Returns:
        The same model.

    Raises:
        IsotuneError: No active adapter wants a covariance, adapters are folded, a layer saw too few rows (no adapter
            is changed then), or values that are all zero or not finite (nor is that layer's).
        OptionError: one_layer_at_a_time with batches that can be walked only once.
    """
    if any(layer.isotune.folded for _, layer in adapted_layers(model)):
        raise IsotuneError("the active adapters are folded into the weights; call unfold before calibrating them")
    layers = {path: layer for path, layer in adapted_layers(model) if _waiting(layer)}
    if not layers:
        raise IsotuneError(
            "no active adapter wants a covariance: none is of a method that starts from data, or it has been trained"
        )
    if one_layer_at_a_time and iter(batches) is batches:
        raise OptionError(
            "one_layer_at_a_time needs batches that can be walked once for every layer, not an iterator; "
            "give a list or a DataLoader"
        )
    parts = [[path] for path in layers] if one_layer_at_a_time else [list(layers)]
    with evaluating(model), batch_bar(batches, len(parts), progress, "calibrating") as advance:
        for number, part in enumerate(parts):
            # The first pass counts what every layer sees, so that nothing has changed where that is too little.
            watched = layers if number == 0 else {path: layers[path] for path in part}
            inputs = _measured(model, batches, watched, part, advance)
            if number == 0:
                _check_rows(layers, inputs, least_rows)
            _check_usable(inputs, part)
            for path in part:
                measured = inputs.pop(path)
                assert measured.sum is not None
                for adapter in _waiting(layers[path]):
                    adapter.calibrate(require_site(layers[path], path), measured.sum / measured.rows)
    return model


def wants_calibration(model: nn.Module) -> bool:
    """Whether an active adapter starts from data and has not been trained."""
    return any(_waiting(layer) for _, layer in adapted_layers(model))


def _waiting(layer: Adapted) -> list[Adapter]:
    return [adapter for adapter in layer.isotune.running() if adapter.wants_covariance]


@dataclass
class _Inputs:
    """What a layer has seen."""

    rows: int = 0
    sum: Tensor | None = None
    """XᵀX (in, in), where it is wanted."""


class _Seen:
    """The input of one call, its rows and, once it is asked for, their product."""

    def __init__(self, x: Tensor, site: Site, mask: Tensor | None) -> None:
        self.x, self.version = x, _version(x)
        # The linear map that the rows are of: two convolutions may cut one input differently.
        self.layer = None if site.rotates_input else site.layer
        self.rows = _rows(x, site, mask)

    def serves(self, x: Tensor, site: Site) -> bool:
        """Whether this is also what another layer sees in x."""
        layer = None if site.rotates_input else site.layer
        return self.x is x and self.version == _version(x) and self.layer is layer

    @cached_property
    def product(self) -> Tensor:
        """XᵀX (in, in) in fp32."""
        with without_autocast(self.rows):
            X = self.rows.float()
            return X.mT @ X


def _version(x: Tensor) -> int | None:
    """A number that changes when x does."""
    return None if x.is_inference() else x._version


class _Gatherer:
    """Hooks that add up what each layer sees; layers fed the same tensor, one after another, share its product."""

    def __init__(self, layers: Mapping[str, Adapted], wanted: Iterable[str]) -> None:
        self.layers, self.wanted = layers, set(wanted)
        self.inputs = {path: _Inputs() for path in layers}
        self.mask: Tensor | None = None
        self.last: _Seen | None = None

    def hook(self, path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def see(_: nn.Module, args: tuple[Any, ...]) -> None:
            x, site, inputs = args[0], require_site(self.layers[path], path), self.inputs[path]
            if self.last is None or not self.last.serves(x, site):
                self.last = _Seen(x, site, self.mask)
            inputs.rows += len(self.last.rows)
            if path in self.wanted:
                product = self.last.product
                inputs.sum = product.clone() if inputs.sum is None else inputs.sum.add_(product)

        return see


def _measured(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Mapping[str, Adapted],
    wanted: Iterable[str],
    advance: Callable[[], None],
) -> dict[str, _Inputs]:
    """One pass: the rows that every layer saw, and the sums of those wanted."""
    gatherer = _Gatherer(layers, wanted)
    handles = [layer.register_forward_pre_hook(gatherer.hook(path)) for path, layer in layers.items()]
    try:
        for batch in batches:
            args, named = arguments_of(batch, device_of(model))
            gatherer.mask, gatherer.last = named.get("attention_mask"), None
            model(*args, **named)
            advance()
    finally:
        for handle in handles:
            handle.remove()
    return gatherer.inputs


def _rows(x: Tensor, site: Site, mask: Tensor | None) -> Tensor:
    """The rows (n, in) of the linear map that x stands for, without those of padding."""
    if not site.rotates_input:
        # What the layer would multiply its weight with: its output for the identity in the place of the weight.
        eye = torch.eye(site.in_features, dtype=site.weight.dtype, device=x.device)
        x = site.project(x, eye)
        if site.kind in CONVOLUTIONS:
            return x.movedim(site.features, -1).reshape(-1, site.in_features)
    if mask is not None and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    if mask is not None and x.dim() == 2 and mask.dim() == 2 and len(x) == mask.numel():
        return x[mask.flatten().bool()]
    return x.reshape(-1, x.shape[-1])


def _check_rows(layers: Mapping[str, Adapted], inputs: Mapping[str, _Inputs], least_rows: int | None) -> None:
    for path, layer in layers.items():
        needed = require_site(layer, path).in_features if least_rows is None else max(1, least_rows)
        if (rows := inputs[path].rows) < needed:
            raise IsotuneError(
                f"{path!r} saw {rows} rows, and its covariance needs {needed}; give more batches, set least_rows "
                "lower, or leave the layer out of the targets"
            )


def _check_usable(inputs: Mapping[str, _Inputs], part: Iterable[str]) -> None:
    for path in part:
        total = inputs[path].sum
        if total is None or not torch.isfinite(total).all() or not total.any():
            raise IsotuneError(
                f"the inputs of {path!r} have no usable covariance: they are all zero, not finite, or too large for "
                "fp32; look at the data, and at the model's outputs on it"
            )
