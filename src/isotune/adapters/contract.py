"""What an adapter is, and the families that carry the arithmetic most methods share.

An adapter is one method's trainable change to one site. It computes with the site it is given and never keeps it,
so that the same adapter serves a bare layer and a layer that has adapters already.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from isotune.adapters.once import Once
from isotune.adapters.shared import Shared
from isotune.adapters.thin_layer import beside
from isotune.errors import IsotuneError, NoWeightError
from isotune.linalg.low_rank import at_most_full_rank
from isotune.linalg.precision import at_least_fp32, autocast
from isotune.sites import Site
from isotune.sites.block import replaced_first

Side = Literal["in", "out"]


class Thin(NamedTuple):
    """A change of `(x L) R`, with L (d, r) and R (r, e), to the rows that enter or leave a site."""

    where: Literal["before", "behind", "beside"]
    """before: `site(x + (x L) R)`; behind: `y + (y L) R` for y without the bias; beside: `site(x) + (x L) R`."""
    L: Tensor
    R: Tensor


class Constants(NamedTuple):
    """A forward pass where nothing learns: a thin change; outputs y, without the bias, become y (1 + excess)."""

    where: Literal["before", "behind", "beside"]
    L: Tensor
    R: Tensor
    excess: Tensor | None = None


class Treatment(NamedTuple):
    """How an optimizer should treat a parameter."""

    rate: float = 1.0
    """Factor on the learning rate."""
    decay: float = 1.0
    """Factor on the weight decay."""


Part = Literal["A", "B", "columns", "matrix", "matrices", "skew"]
"""What a matrix is: one of B A; directions, as columns (d, r); any, or a batch; skew, given above its diagonal."""
Parts = Mapping[str, Part]


class Adapter(nn.Module, ABC):
    """One method's trainable change to one site."""

    method: ClassVar[str]
    """Name of the method; the prefix of its tensors on disk."""
    stride: Mapping[str, float] = MappingProxyType({})
    """`strides` as they were when the adapter was put on its layer."""
    parts: Parts = MappingProxyType({})
    """Which of its own parameters, by name, are matrices to an optimizer that steps them as a whole, such as Muon."""
    product_scale: float | None = None
    """s, where the change is `s B A`, or differs from it by a constant, with its own parameters A and B."""
    memory: frozenset[str] = frozenset()
    """Buffers that its training alone needs: they are in a trainer's checkpoints, and not in the adapter's file."""
    shared: Shared
    """What it has in common with the adapters on other layers, once `share` was called."""

    @abstractmethod
    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """The site's output with the change, computed the cheap way: of x (..., in) the y (..., out)."""

    @abstractmethod
    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """The same of the same x (..., in), the slow and obvious way: what every law compares with."""

    def weight(self, W: Tensor) -> Tensor:
        """The changed weight (out, in), exactly, in W's dtype. Raises NoWeightError where the change has none."""
        raise NoWeightError(self.no_weight)

    @property
    def has_weight(self) -> bool:
        """Whether its change is one of the weight."""
        return type(self).weight is not Adapter.weight

    @property
    def no_weight(self) -> str:
        """Why its change is none of the weight, where it is none."""
        return f"the change that {self.method} makes is none of a weight"

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The changed bias (out) of a layer with the bias b, in b's dtype; by default b itself."""
        return b

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor] | None:
        """B (out, r) and A (r, in) with `weight(W) = W + B A` exactly, or None where the method has no such form."""
        return None

    def thin_factors(self, site: Site) -> Thin | None:
        """The forward pass on `site` as one thin change, by which batches mix adapters; None where it is none."""
        return None

    def constants(self, x: Tensor, site: Site) -> Constants | None:
        """The forward pass on rows like x (..., in), for many calls, before the site or beside it; or None."""
        thin = self.thin_factors(site)
        if thin is None or thin.where != "behind":
            return None if thin is None else Constants(*thin)
        return None if site.packed else Constants("beside", at_least_fp32(site.weight).mT @ thin.L, thin.R)

    def share(self, shared: Shared) -> None:
        """Take over what `Settings.shared` gave, or a file held, on the adapter's device, as `self.shared`.

        Raises KeyError, ValueError or IndexError where it does not fit.
        """
        raise KeyError(f"unexpected {', '.join(shared.tensors())}")

    def calibrate(self, site: Site, covariance: Tensor) -> None:
        """Start from `XᵀX / n` (in x in, fp32) of the rows that reach the site; only where `wants_covariance`."""
        raise NotImplementedError(self.method)

    @property
    def wants_covariance(self) -> bool:
        """Whether `isotune.calibrate` has to measure the inputs of the site for it."""
        return False

    def strides(self, site: Site) -> dict[str, float]:
        """How far a step turns the weight, for a method that rotates: by the names of the parameters that do.

        Of a step of the same size in every number, as Adam takes it, `|R' - R|_F` to first order, as a multiple of
        what it is with the method's default options on 384 dimensions, where the default learning rates were chosen.
        """
        return {}

    @property
    def lengthless(self) -> frozenset[str]:
        """Those of `strides` of which only the directions matter: their length may be chosen for the step's sake."""
        return frozenset()

    def parameter_groups(self) -> dict[str, Treatment]:
        """How an optimizer should treat its parameters, by name; those not named in the usual way."""
        return {}

    def penalty(self, site: Site) -> Tensor:
        """A scalar to add to the loss."""
        parameter = next(self.parameters())
        return torch.zeros((), dtype=parameter.dtype, device=parameter.device)

    def after_step(self, progress: float) -> None:
        """What the method does after each optimizer step: projection, proximal step, schedule; by default nothing.

        `progress` is the share of training that is done, above 0 and at most 1.
        """

    @classmethod
    def after_steps(cls, adapters: Mapping[Self, Site], progress: float) -> Sequence[nn.Parameter]:
        """`after_step` of a model's adapters of this class, on their sites; gives what the optimizer starts anew."""
        for adapter in adapters:
            adapter.after_step(progress)
        return ()

    def peft_state(self, site: Site) -> dict[str, Tensor]:
        """The adapter's tensors under the names and in the shapes of PEFT's files, as views where they can be."""
        return {f"{self.method}_{name}": t for name, t in self.state_dict().items() if name not in self.memory}

    def load_peft_state(self, tensors: dict[str, Tensor], site: Site) -> None:
        """Take over tensors from `peft_state`, bit for bit. Raises KeyError or ValueError where they do not fit.

        By default they are copied into what `peft_state` gives, which must then be views of the adapter's own.
        """
        own = self.peft_state(site)
        check_tensors(tensors, {name: tuple(tensor.shape) for name, tensor in own.items()})
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_tensors(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raise KeyError for names missing or left over, ValueError for a wrong shape."""
    if missing := sorted(expected.keys() - found.keys()):
        raise KeyError(f"missing {', '.join(missing)}")
    if left_over := sorted(found.keys() - expected.keys()):
        raise KeyError(f"unexpected {', '.join(left_over)}")
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(found[name].shape)}, expected {shape}")


class WeightAdapter(Adapter):
    """A change of the weight: W becomes `weight(W)`, shapes (out, in)."""

    @abstractmethod
    def weight(self, W: Tensor) -> Tensor:
        """The changed weight (out, in), exactly, in W's dtype."""

    def forward(self, x: Tensor, site: Site) -> Tensor:
        """The site's output (..., out) with the changed weight; by default the dense way."""
        return self.reference(x, site)

    def reference(self, x: Tensor, site: Site) -> Tensor:
        """The site's output (..., out) with the changed weight in the place of its own."""
        return site.forward_with(x, self.weight(site.weight), self.bias(site.bias))


class Branch(Adapter):
    """`y = f(x) + g(v)` beside a block f, v what it reads or (the first tensor that it) gives; g starts at zero."""

    reads: ClassVar[Literal["input", "output"]] = "input"

    @abstractmethod
    def change(self, v: Tensor) -> Tensor:
        """g(v), for v (..., in) and g (..., out)."""

    def forward(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        y = site(x, *args, **kwargs)
        return replaced_first(y, lambda first: first + self.change(x if self.reads == "input" else first).to(first))

    def reference(self, x: Tensor, site: Site, *args: Any, **kwargs: Any) -> Any:
        """As `forward`, (..., in) to (..., out), where that is what is written; others say here what they compute."""
        return Branch.forward(self, x, site, *args, **kwargs)


class Rotation(WeightAdapter):
    """`W' = W R` (side "in", R is in x in) or `W' = Rᵀ W` (side "out", R is out x out), R orthogonal."""

    side: Side

    @abstractmethod
    def rotate(self, v: Tensor, transpose: bool = False) -> Tensor:
        """`v R`, or `v Rᵀ`, for rows v (..., d), in v's dtype."""

    def forward(self, x: Tensor, site: Site) -> Tensor:
        if self.side == "out" and site.rotates_output:
            return site.over_outputs(site(x), self.rotate)
        if self.side == "in" and site.rotates_input:
            # y = x (W R)ᵀ = (x Rᵀ) Wᵀ: note the transpose.
            return site(self.rotate(autocast(x), transpose=True))
        if (factors := self.factors(site.weight)) is None:
            return super().forward(x, site)
        return beside(site, x, factors[1].mT, factors[0].mT)

    def weight(self, W: Tensor) -> Tensor:
        return self.rotate(W) if self.side == "in" else self.rotate(W.mT).mT


class LowRank(WeightAdapter):
    """`W' = W + B A`, with B (out, r) and A (r, in) that do not depend on W."""

    parts: Parts = MappingProxyType({"A": "A", "B": "B"})

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self._once = Once()

    @abstractmethod
    def change(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), any scaling included."""

    def scaled_change(self) -> tuple[Tensor, Tensor, float]:
        """B (out, r), A (r, in) and a factor on their product, as the forward pass takes them."""
        return *self._once.get(self, self.change), 1.0  # type: ignore[return-value]

    def factors(self, W: Tensor) -> tuple[Tensor, Tensor]:
        B, A = self.change()
        return at_most_full_rank(B.to(W.dtype), A.to(W.dtype))

    def forward(self, x: Tensor, site: Site) -> Tensor:
        # Indices into an embedding have no features to drop.
        if self.training and self.dropout.p and x.is_floating_point():
            return self.add(site, self.dropout(x), site(x))
        return self.add(site, x)

    def add(self, site: Site, x: Tensor, y: Tensor | None = None) -> Tensor:
        """`y + x Aᵀ Bᵀ` for x (..., in), y (..., out), as the site reads x; y is `site(x)` where it is not given."""
        B, A, scale = self.scaled_change()
        return beside(site, x, A.mT, B.mT, scale, y)

    def weight(self, W: Tensor) -> Tensor:
        B, A = self.factors(W)
        return W + B @ A

    def thin_factors(self, site: Site) -> Thin | None:
        if type(self).forward is not LowRank.forward:
            return None
        if self.training and self.dropout.p:
            raise IsotuneError(
                f"{self.method} has dropout, which rows of one batch with different adapters cannot share in "
                "training; call model.eval(), or train one adapter at a time"
            )
        B, A = self.change()
        return Thin("beside", A.mT, B.mT)
