"""What becomes of a module that gets adapters: it keeps its place, name and parameters, and its class is extended.

The class of an adapted layer becomes a subclass of what it was, whose forward runs the adapters in `layer.isotune`
around the layer's own; that of a module trained in full one whose forward runs a copy, kept there as well. `leave`
gives the class back.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from isotune.adapted_site import AdaptedSite
from isotune.adapters.inference import Inference, inference
from isotune.adapters.mixed import Routing, mixed_forward
from isotune.adapters.settings import Settings
from isotune.bare import HOME, bare, bare_forward, own_forward
from isotune.errors import IsotuneError
from isotune.linalg.autograd import transformed
from isotune.sites import Site, require_site, site_of


class Adapters(nn.ModuleDict):
    """The adapters of one layer by name, or the copies of one module: what stands in the model as `layer.isotune`."""

    inference: Inference | None = None
    """What is kept where nothing learns."""
    refused: tuple[str, ...] = ()
    """The running adapters for which nothing can be kept: none, until it was tried."""

    def __init__(self, own_forward: Any = None, first: str = "input") -> None:
        super().__init__()
        self.first_argument = first  # the name of the forward's first argument
        self.active: tuple[str, ...] = ()
        # Where the rows of a batch use different adapters: which of `active`.
        self.routing: Routing | None = None
        self.enabled = True
        self.folded = False
        self.settings: dict[str, Settings] = {}
        # What folding replaced: modules of the base (or its config), names in them, and what stood there.
        self.kept: list[tuple[Any, str, Any]] = []
        # A forward that was put on the layer itself, as accelerate does; it is the layer's own then.
        self.own_forward = own_forward

    def at_inference(self, layer: nn.Module, x: Tensor) -> Any:
        """The layer's output for x by what is kept for inference, made if need be; None where that is no way."""
        if transformed() or not self.active or not self.enabled or self.folded or self.refused is self.active:
            return None
        if not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
            return None
        kept = self.inference
        if kept is None or kept.active is not self.active or kept.routing is not self.routing or not kept.serves(x):
            kept = inference(x, require_site(layer, ""), self.running(), self.routing)
            self.inference = kept
            if kept is None:
                self.refused = self.active  # until others run, or training starts
            else:
                kept.active, kept.routing = self.active, self.routing
        return None if kept is None else kept(x)

    def train(self, mode: bool = True) -> Adapters:
        """Set the mode; what is kept for inference is dropped when training starts."""
        if mode:
            self.inference, self.refused = None, ()
        return super().train(mode)

    def running(self) -> list[Any]:
        """What takes part in the forward pass, in order."""
        return [self[name] for name in self.active] if self.enabled and not self.folded else []


class InPlace(nn.Module):
    """What the extended classes have in common."""

    isotune: Adapters
    base_class: ClassVar[type[nn.Module]]
    mixin: ClassVar[type[InPlace]]

    def __reduce__(self) -> Any:
        # The class is made, not imported: a pickle names what it was made of.
        return _rebuilt, (self.mixin, self.base_class), self.__getstate__()


class Adapted(InPlace):
    """A frozen layer and its adapters, stacked in the order of `isotune.active`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with its running adapters."""
        adapters: Any = self._modules[HOME]  # as self.isotune, at a tenth of its price
        if len(args) == 1 and not (kwargs or self.training or torch.is_grad_enabled()):
            y = adapters.at_inference(self, args[0]) if isinstance(args[0], Tensor) else None
            if y is not None:
                return y
        elif adapters.inference is not None:
            adapters.inference = None
        if not args:
            args = (kwargs.pop(adapters.first_argument),)
        if adapters.routing is not None and adapters.enabled:
            return mixed_forward(args[0], require_site(self, ""), adapters.running(), adapters.routing)
        return adapted_site(self)(*args, **kwargs)


class Readable(Adapted):
    """An adapted layer of which others may read weight and bias, and find the adapters in them."""

    answers: ClassVar[bool] = True

    @property
    def weight(self) -> Any:
        """The adapted weight in the layer's own shape and dtype, of a packed base dense and in fp32.

        It is the base's own parameter where there is no such thing: nothing is active, what is active has no weight,
        the rows of a batch use different adapters, or FSDP2 has sharded it. Raises TargetError where the base cannot
        be dequantised.
        """
        own, running = bare(self, "weight"), self.isotune.running()
        if not running or self.isotune.routing is not None or hasattr(own, "full_tensor"):
            return own
        return adapted_weight(self) if all(adapter.has_weight for adapter in running) else own

    @weight.setter
    def weight(self, value: Any) -> None:
        self.__dict__["weight"] = value  # what is no parameter: torch's weight_norm sets such

    @property
    def bias(self) -> Any:
        """The adapted bias; the base's own parameter where nothing is active."""
        mixes = self.isotune.routing is not None
        return bare(self, "bias") if mixes else adapted_site(self).bias

    @bias.setter
    def bias(self, value: Any) -> None:
        self.__dict__["bias"] = value


class Trained(InPlace):
    """A module that is trained in full, as a copy: the last active copy runs, and answers, for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the copy computes, in the dtype that came in; without one, the module itself."""
        twin = current(self)
        if twin is self:
            return bare_forward(self, *args, **kwargs)
        # The copy of a half-precision module is in fp32.
        own, base = _dtype(twin.parameters()), _dtype(self.parameters())  # of which the first are the base's
        if own == base:
            return twin(*args, **kwargs)
        given = _dtype(tree_leaves((args, kwargs)))
        if given is None:  # indices into an embedding
            return _cast(twin(*args, **kwargs), base)
        if torch.is_autocast_enabled(next(twin.parameters()).device.type):
            return twin(*args, **kwargs)
        args, kwargs = _cast((args, kwargs), own)
        return _cast(twin(*args, **kwargs), given)

    def __getattr__(self, name: str) -> Any:
        # Who asks for a parameter or a child gets the copy's; but the table of an embedding to which a head is tied.
        found = super().__getattr__(name)
        twin = self if name == HOME or isinstance(self, nn.Embedding) else current(self)
        return found if twin is self else getattr(twin, name)


_CLASSES: dict[Any, Any] = {}


def _class(mixin: type[InPlace], base: type[nn.Module]) -> Any:
    """The class, made once."""
    if (mixin, base) not in _CLASSES:
        _CLASSES[mixin, base] = _made(mixin, base)
    return _CLASSES[mixin, base]


def _made(mixin: type[InPlace], base: type[nn.Module]) -> Any:
    # transformers looks up what a class can record by how the class is printed, which is its qualified name.
    members = {
        "__module__": base.__module__, "__qualname__": base.__qualname__, "base_class": base, "mixin": mixin,
    }  # fmt: skip
    name = "Trained" if mixin is Trained else "Adapted"
    return type(f"{name}{base.__name__}", (mixin, base), members)


def _rebuilt(mixin: type[InPlace], base: type[nn.Module]) -> nn.Module:
    made = _class(mixin, base)
    return made.__new__(made)


def extend(module: nn.Module, mixin: type[InPlace]) -> Any:
    """The module, its class extended if need be."""
    if not isinstance(module, InPlace):
        first = next((name for name in inspect.signature(module.forward).parameters), "input")
        home = Adapters(module.__dict__.pop("forward", None), first).train(module.training)
        module.__class__ = _class(mixin, type(module))
        module.add_module(HOME, home)
    return module


def leave(module: InPlace) -> None:
    """Give the module its class back. Raises IsotuneError where someone extended the class since."""
    if type(module) is not _class(module.mixin, module.base_class):
        raise IsotuneError(
            f"the class of a {module.base_class.__name__} was extended after its adapters came, to "
            f"{type(module).__name__} (by FSDP2 or a parametrization); undo that first"
        )
    own, base = own_forward(module), module.base_class
    del module.isotune
    module.__class__ = base  # type: ignore[assignment]
    if own is not None:
        module.__dict__["forward"] = own


def add_adapter(layer: nn.Module, name: str, adapter: nn.Module, settings: Settings) -> None:
    """Attach an adapter to a layer, not yet active."""
    site = site_of(layer, settings.kinds)
    extended = extend(layer, Readable if site is not None and site.readable else Adapted)
    extended.isotune[name] = adapter.train(layer.training)
    extended.isotune.settings[name] = settings


def add_copy(module: nn.Module, name: str) -> None:
    """Attach a copy of a module, of the base alone, not yet active; that of a half-precision one in fp32."""
    twin = bare_copy(module)
    for hooks, found in vars(twin).items():
        if hooks.startswith(("_forward", "_backward")) and isinstance(found, dict):
            found.clear()  # those of the module itself run when it is called
    if _dtype(twin.parameters()) in (torch.float16, torch.bfloat16):
        twin.float()
    extend(module, Trained).isotune[name] = twin


def bare_copy(module: nn.Module) -> nn.Module:
    """A copy of the module as it is without adapters on it."""
    twin = copy.deepcopy(module, {id(module._modules.get(HOME)): None})
    if isinstance(twin, InPlace):
        own, twin.__class__ = own_forward(module), twin.base_class  # type: ignore[assignment]
        del twin._modules[HOME]
        if own is not None:
            twin.__dict__["forward"] = own
    return twin


def current(module: nn.Module) -> nn.Module:
    """The copy in use of a module that is trained in full, or the module itself."""
    running = module._modules[HOME].running()  # type: ignore[union-attr, operator]
    return running[-1] if running else module


def adapted_site(layer: nn.Module) -> Site:
    """The layer with its running adapters, as a site. Raises IsotuneError where they differ by row."""
    adapters: Any = layer.isotune
    if adapters.routing is not None and adapters.enabled:
        raise IsotuneError("the rows of a batch use different adapters, so that a layer has no one adapted weight")
    site = require_site(layer, "")
    for adapter in adapters.running():
        site = AdaptedSite(site, adapter)
    return site


def adapted_weight(layer: nn.Module) -> Tensor:
    """The weight with its running adapters, dense, in the layer's own shape and, unless it is packed, dtype."""
    site = adapted_site(layer)
    W = site.layout(site.weight)
    return W if site.packed else W.to(site.parameter.dtype)


def bare_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state as it is without adapters."""
    return {name: t for name, t in module.state_dict().items() if name.partition(".")[0] != HOME}


def bare_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The module and those in it, by name, without adapters."""
    return ((name, m) for name, m in nn.Module.named_modules(module) if name.partition(".")[0] != HOME)


def _dtype(values: Iterable[Any]) -> torch.dtype | None:
    """The dtype of the first floating-point tensor."""
    return next((v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def _cast(values: Any, dtype: torch.dtype | None) -> Any:
    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tree_map(cast, values)
