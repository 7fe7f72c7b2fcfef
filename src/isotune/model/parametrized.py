"""Adapters on a parameter whose module computes with it itself: through `torch.nn.utils.parametrize`.

Packed attention projections, recurrent weights, transposed convolutions, fused experts: there is no layer to adapt,
so the adapted weight is computed, `W' = weight(W)`, wherever the module asks for the parameter. It costs the dense
weight once for each forward pass of the module, in which it is kept; experts are computed one after the other. A
model with such adapters can be copied, but torch refuses to pickle it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from isotune.adapters.contract import Adapter
from isotune.errors import IsotuneError, TargetError
from isotune.linalg.thin import without_autocast
from isotune.matrix import Matrix, matrices_of, parametrization
from isotune.model.adapted import InPlace, Trained, adapted_site, leave
from isotune.sites import Site, site_of

_WHOLE = "whole"


class AdaptedTensor(nn.Module):
    """The parametrization on one parameter; `matrices` has each of its adapted matrices, experts by their index."""

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.matrices = nn.ModuleDict()
        siblings = [chain[0] for chain in getattr(owner, "parametrizations", {}).values()]
        known = [sibling.order for sibling in siblings if isinstance(sibling, AdaptedTensor)]
        self.order: list[str] = known[0] if known else list(owner._parameters)
        self.kept: list[nn.Parameter] = []
        # Within a forward pass of the owner: the adapted parameter, by whether it has a graph.
        self.memo: dict[bool, Tensor] | None = None
        self.recurrent = isinstance(owner, nn.RNNBase)
        self.hooks = [
            owner.register_forward_pre_hook(self._begin),
            owner.register_forward_hook(self._end, always_call=True),
        ]

    def forward(self, original: Tensor) -> Tensor:
        """The parameter with its running adapters; itself where none runs, or they are folded into it."""
        changed = [m for m in self.adapted() if m.isotune.running()]
        if not changed:
            return original
        if self.memo is None:
            # Outside its forward pass an RNN keeps what it reads, which must then hold no graph.
            return self._adapted(original, changed).detach() if self.recurrent else self._adapted(original, changed)
        key = torch.is_grad_enabled()
        if key not in self.memo:
            self.memo[key] = self._adapted(original, changed)
        return self.memo[key]

    def adapted(self) -> list[Any]:
        """The adapted matrices."""
        return list(self.matrices.values())

    def write(self, W: Tensor, matrix: Matrix) -> None:
        """Put W (out, in) in the place of the matrix, in a copy of the parameter; the first time keep the old one."""
        chain = parametrization(matrix.owner, matrix.name)
        with torch.no_grad():
            if not self.kept:
                self.kept = [chain.original]
                # A new parameter, so that one tied to this elsewhere in the model keeps its value.
                copy = chain.original.detach().clone(memory_format=torch.contiguous_format)
                chain.original = nn.Parameter(copy, requires_grad=False)
            matrix.view(chain.original).copy_(W)

    def restore(self) -> None:
        """Put the parameter that `write` kept back."""
        if self.kept:
            matrix = self.adapted()[0]
            (old,), self.kept = self.kept, []
            if old.device != matrix.parameter.device:
                old.data = old.data.to(matrix.parameter.device)
            parametrization(matrix.owner, matrix.name).original = old

    def detach(self, owner: nn.Module, name: str) -> None:
        """Give the owner its parameter, its place among the others and its class back."""
        for hook in self.hooks:
            hook.remove()
        # A deep copy shares the class that torch made, and must keep its property when this one loses it.
        kind = type(owner)
        own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
        owner.__class__ = type(kind.__name__, kind.__bases__, own)
        parametrize.remove_parametrizations(owner, name, leave_parametrized=False)
        found = owner._parameters
        owner._parameters = {key: found[key] for key in [*self.order, *found] if key in found}
        if isinstance(owner, nn.RNNBase):
            owner._init_flat_weights()

    def _adapted(self, original: Tensor, changed: list[Any]) -> Tensor:
        with without_autocast(original):
            new = [matrix.part(adapted_site(matrix).weight.to(original.dtype)) for matrix in changed]
            if changed[0].index is None:
                return new[0].contiguous()
            parts = list(original.unbind())
            for matrix, part in zip(changed, new, strict=True):
                parts[matrix.index] = part
            return torch.stack(parts)

    def _begin(self, owner: nn.Module, arguments: Any) -> None:
        self.memo = {}

    def _end(self, owner: nn.Module, arguments: Any, output: Any) -> None:
        self.memo = None
        if isinstance(owner, nn.RNNBase):
            # What it has read for cuDNN would keep the graph alive, and forbid a deep copy; it reads it anew.
            owner._flat_weights = [w if isinstance(w, nn.Parameter) else None for w in owner._flat_weights]


def with_matrices(modules: dict[str, nn.Module], wanted: Iterable[str]) -> dict[str, nn.Module]:
    """The modules by path, with the matrices of their parameters too where a wanted path is no module's."""
    if all(path in modules for path in wanted):
        return modules
    return {**matrices_by_path(modules, older=True), **modules}


def matrices_by_path(modules: Mapping[str, nn.Module], older: bool = False) -> dict[str, nn.Module]:
    """The matrices of the parameters of all modules that are no layer themselves.

    With `older` also those of modules that have become layers since files were written.
    """
    return {
        f"{path}.{name}" if path else name: matrix
        for path, module in modules.items()
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding, Trained, Matrix))
        and (not site_of(module) or (older and isinstance(module, (nn.Conv1d, nn.Conv3d))))
        for name, matrix in matrices_of(module)
    }


def put_on(matrix: Matrix) -> Matrix:
    """The matrix that stands for this one on its parameter, put there if need be."""
    owner, name = matrix.owner, matrix.name
    if parametrization(owner, name) is None:
        parametrize.register_parametrization(owner, name, AdaptedTensor(owner), unsafe=True)
    matrices, key = home_of(matrix).matrices, _key(matrix)
    if key not in matrices:
        matrices[key] = matrix
    return cast(Matrix, matrices[key])


def home_of(matrix: Matrix) -> AdaptedTensor:
    """What holds the matrix, with the others of its parameter."""
    return cast(AdaptedTensor, parametrization(matrix.owner, matrix.name)[0])


def take_off(module: InPlace) -> None:
    """Give a module its class back; a parameter is its module's own again when the last matrix is off it."""
    leave(module)
    if isinstance(module, Matrix):
        home = home_of(module)
        del home.matrices[_key(module)]
        if not home.matrices:
            home.detach(module.owner, module.name)


@torch.no_grad()
def check_uncalled(adapter: Adapter, site: Site, path: str) -> None:
    """Raise TargetError unless `weight(W)` alone is all that the adapter does on a layer that is never called."""
    why = None
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in adapter.modules()):
        why = "its dropout acts on rows that enter a layer, which a parameter does not see: set dropout=0"
    else:
        try:
            W = adapter.weight(site.weight)
        except (IsotuneError, NotImplementedError) as error:
            why = f"it has no adapted weight to offer: {error}"
        else:
            if W.shape != site.weight.shape:
                why = f"its weight has shape {tuple(W.shape)}, not {tuple(site.weight.shape)}"
            elif isinstance(site.layer, Matrix) and adapter.bias(None) is not None:
                why = "it also changes the bias, and a parameter has none"
    if why is not None:
        raise TargetError(f"{adapter.method} cannot adapt {path!r}, a parameter of a {_owner(site.layer)}: {why}")


def _owner(layer: nn.Module) -> str:
    # A Linear that is never called is nn.MultiheadAttention's, which reads its weight and computes with it itself.
    owner = layer.owner if isinstance(layer, Matrix) else nn.MultiheadAttention(1, 1)
    return parametrize.type_before_parametrizations(owner).__name__


def _key(matrix: Matrix) -> str:
    return _WHOLE if matrix.index is None else str(matrix.index)
