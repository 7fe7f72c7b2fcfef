"""Put adapters on a model and take them off again, in place."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from isotune.adapters.contract import Adapter
from isotune.adapters.settings import Settings
from isotune.adapters.shared import Shared
from isotune.bare import bare_class
from isotune.errors import IsotuneError, OptionError, TargetError
from isotune.matrix import Matrix
from isotune.model.adapted import Adapters, add_adapter, add_copy
from isotune.model.names import adapted_layers, base_modules, changed_modules
from isotune.model.parametrized import check_uncalled, put_on, take_off, with_matrices
from isotune.model.rates import choose_lengths
from isotune.model.running import remember_statistics
from isotune.model.switch import adapter_names, use
from isotune.model.targets import Targets, find_modules, find_targets, matching
from isotune.sites import Site, device_of, site_of


def adapt(
    model: nn.Module,
    settings: Settings,
    targets: Targets | None = None,
    *,
    exclude: Targets | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
    train_also: Iterable[str] = (),
    seed: int | None = None,
) -> nn.Module:
    """Freeze the model and put an adapter on each target layer, in place; the adapter becomes the only active one.

    Args:
        model: Any PyTorch model; its class and its own parameters stay as they are.
        settings: The method, such as `HRA(rank=8)`.
        targets: "attention", "query-value", "mlp" or "all-linear" (found by the model's structure, the output head
            and embeddings left out), "norms", "biased", "blocks", "stack" (what turns token ids into hidden
            states), a list of name suffixes, a regular expression for the whole path, or a callable
            `(path, module) -> bool`.
            A parameter that its module computes with itself is named as well, or its module (`"in_proj_weight"`,
            `"lstm"`, `"experts.down_proj"`): one adapter for each matrix in it. Of a method that stands beside a
            block, "attention" and "mlp" are those blocks. By default what the method usually goes on: for most
            "attention".
        exclude: Layers to leave out, said in the same way.
        overrides: Other options for some of the targets, such as `{"query": {"rank": 16}}`.
        name: The adapter's name; several adapters can be on one model.
        train_also: Modules (by path or suffix) to train in full, as copies; they are saved with the adapter.
        seed: Seed of the adapter's start; by default it is drawn from torch's global generator.

    Returns:
        The same model.

    Raises:
        TargetError: A target or override matches nothing, or a layer that the method cannot adapt.
        OptionError: An option does not fit a layer, or the name is taken. The model is then as it was.
    """
    trained = find_modules(model, train_also)
    targets = settings.usual_targets if targets is None else targets
    layers = find_targets(model, targets, exclude, trained, settings.kinds)
    check_in_memory({**layers, **trained}, may_be_empty=True)
    sites = {path: site_for(layer, path, settings) for path, layer in layers.items()}
    chosen = _settings_by_path(model, settings.allot(sites), layers, overrides or {})
    seed = int(torch.randint(2**31, (), device="cpu")) if seed is None else seed
    adapters = build_adapters(layers, chosen, seed)
    attach(model, adapters, chosen, trained, name)
    return use(model, name)


def check_in_memory(modules: Mapping[str, nn.Module], may_be_empty: bool = False) -> None:
    """Raise TargetError for a module whose weights are elsewhere between calls or, unless allowed, have no values."""
    for path, module in modules.items():
        holder = module.owner if isinstance(module, Matrix) else module
        if not any(p.is_meta for p in holder.parameters()):
            continue
        if any(hasattr(m, "_hf_hook") for m in holder.modules()):
            raise TargetError(
                f"{path!r} is offloaded: its weights are in memory while it runs, and adapters always need them. "
                "Open the model where it fits whole, keep such layers in memory (device_map=...), or leave them out "
                "(exclude=...)"
            )
        if not may_be_empty:
            raise TargetError(
                f"{path!r} is on the meta device: it has no values for an adapter to work with. Open the model with "
                "from_pretrained, or give it its weights with load_state_dict(..., assign=True)"
            )


def build_adapters(
    layers: Mapping[str, nn.Module],
    settings: Mapping[str, Settings],
    seed: int | None = None,
    shared: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> dict[str, Adapter]:
    """An adapter for each layer, by path, on the layer's device; nothing is attached.

    Without a seed its values are undefined, and about to be loaded. `shared` is what each has in common with others;
    by default it is drawn. Raises TargetError or OptionError for a layer that its settings, or `shared`, do not fit.
    """
    adapters = {path: _build(settings[path], layer, path, seed) for path, layer in layers.items()}
    if shared is None:
        shared = draw_shared(settings, {p: site_for(layer, p, settings[p]) for p, layer in layers.items()})
    if any(shared.values()):
        _share(adapters, layers, shared, next(iter(settings.values())).trains_shared)
    if seed is not None:
        sites = {path: site_for(layer, path, settings[path]) for path, layer in layers.items()}
        for path, adapter in adapters.items():
            if not sites[path].called:
                check_uncalled(adapter, sites[path], path)
        choose_lengths(adapters, sites)
    return adapters


def draw_shared(settings: Mapping[str, Settings], sites: Mapping[str, Site]) -> dict[str, dict[str, Tensor]]:
    """What each adapter with these settings, on all the sites of one model by path, has in common with others.

    Raises OptionError where their settings differ.
    """
    if not settings:
        return {}
    first = next(iter(settings.values()))
    with _usual_defaults():
        shared = first.shared_at(sites)
    names = list(dict.fromkeys(name for own in shared.values() for name in own))
    if names and any(other != first for other in settings.values()):
        raise OptionError(
            f"{first.name} shares {', '.join(names)} among all layers, so that overrides cannot give some of them "
            "other options"
        )
    return shared


def attach(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    settings: Mapping[str, Settings],
    trained: Mapping[str, nn.Module],
    name: str,
) -> None:
    """Freeze the model and put built adapters, and copies of the modules in `trained`, on it, not yet active.

    Raises OptionError where the name is taken; the model is then as it was.
    """
    _check_name(model, name)
    modules = with_matrices(dict(base_modules(model)), adapters)
    _check_trained(trained)
    if not adapter_names(model):
        remember_statistics(model)
    model.requires_grad_(False)
    for path, adapter in adapters.items():
        layer = modules[path]
        adapter.stride = adapter.strides(site_for(layer, path, settings[path]))
        add_adapter(put_on(layer) if isinstance(layer, Matrix) else layer, name, adapter, settings[path])
    for path in trained:
        add_copy(modules[path], name)


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Take an adapter (or, without a name, all of them) off the model; the base is as it was, bit for bit.

    Raises IsotuneError for an unknown name, or where the adapter is folded into the weights (unfold
    first) or used by rows of a batch.
    """
    known = adapter_names(model)
    if name is not None and name not in known:
        raise IsotuneError(f"no adapter {name!r} to remove; the model has: {', '.join(known) or 'none'}")
    changed = list(changed_modules(model))
    if any(module.isotune.folded for _, module in changed):
        raise IsotuneError("the model's adapters are folded into its weights; call unfold first")
    if name is not None and any(m.isotune.routing is not None and name in m.isotune.active for _, m in changed):
        raise IsotuneError(f"rows of a batch use the adapter {name!r}; choose others first, with isotune.use")
    for _, module in changed:
        home = module.isotune
        for gone in [name] if name is not None else known:
            if gone in home:
                del home[gone]
                home.settings.pop(gone, None)
        home.active = tuple(n for n in home.active if n in home)
        if not home:
            take_off(module)
    return model


def _check_name(model: nn.Module, name: str) -> None:
    if not name or "." in name or hasattr(Adapters(), name):
        raise OptionError(
            f"adapter name {name!r} is not usable: it must not be empty, contain a dot, or be what `layer.isotune` "
            "has already, as keys and active are"
        )
    if name in adapter_names(model):
        raise OptionError(f"the model already has an adapter {name!r}; choose another name, or remove that one first")
    if any(module.isotune.folded for _, module in changed_modules(model)):
        raise OptionError("the model's adapters are folded into its weights; call unfold before adding another")


def site_for(layer: nn.Module, path: str, settings: Settings) -> Site:
    """The layer as a site that the method can adapt. Raises TargetError where it is none."""
    site = site_of(layer, settings.kinds)
    if site is None or site.kind not in settings.kinds:
        raise TargetError(
            f"{settings.name} cannot adapt {path!r}, a {bare_class(layer).__name__}; it can adapt: "
            f"{', '.join(sorted(settings.kinds))}"
        )
    return site


def _settings_by_path(
    model: nn.Module,
    allotted: dict[str, Settings],
    layers: dict[str, nn.Module],
    overrides: Mapping[str, Mapping[str, Any]],
) -> dict[str, Settings]:
    chosen = dict(allotted)
    for pattern, options in overrides.items():
        for path in matching(layers, pattern, model):
            own = allotted[path]
            chosen[path] = type(own)(**{**own.model_dump(exclude_unset=True), **options})
    return chosen


def _build(settings: Settings, layer: nn.Module, path: str, seed: int | None) -> Adapter:
    site = site_for(layer, path, settings)
    # One stream for each path: a layer starts the same whatever other layers are targeted.
    # Hashed to 32 bits, because torch's CPU generator ignores all but the low 32 bits of its seed.
    generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{seed} {path}".encode()))
    try:
        with _usual_defaults():
            adapter = settings.shell(site) if seed is None else settings.build(site, generator)
    except OptionError as error:
        raise OptionError(f"{settings.name} at {path!r}: {error}") from None
    return adapter.to(device_of(layer), _dtype_of(layer))


@contextmanager
def _usual_defaults() -> Iterator[None]:
    """Torch's default device and dtype as they are at first: what is drawn is the same, whatever they were set to."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _share(
    adapters: Mapping[str, Adapter],
    layers: Mapping[str, nn.Module],
    shared: Mapping[str, Mapping[str, Tensor]],
    trained: bool,
) -> None:
    """Give the adapters what they share, one copy for each device and dtype, or where it is trained one alone."""
    copies: dict[Any, Shared] = {}
    places: dict[int, Any] = {}
    parameters: dict[int, nn.Parameter] = {}
    for path, adapter in adapters.items():
        where = device_of(layers[path]), _dtype_of(layers[path])
        own = shared[path]
        try:
            if trained and any(places.setdefault(id(tensor), where) != where for tensor in own.values()):
                raise ValueError("it trains, so that all layers have to be on one device and of one precision")
            if (id(own), where) not in copies:
                here = {name: tensor.to(*where) for name, tensor in own.items()}
                if trained:
                    here = {name: parameters.setdefault(id(own[name]), nn.Parameter(t)) for name, t in here.items()}
                copies[id(own), where] = Shared(here, trained)
            adapter.share(copies[id(own), where])
        except (KeyError, ValueError, IndexError) as error:
            raise OptionError(f"{adapter.method} at {path!r}, what it shares: {error.args[0]}") from None


def _dtype_of(layer: nn.Module) -> torch.dtype:
    """Adapters are fp32, so that small steps are not lost; in a double-precision model they are double."""
    own = [layer.parameter] if isinstance(layer, Matrix) else layer.parameters()
    return torch.float64 if any(p.dtype == torch.float64 for p in own) else torch.float32


def _check_trained(trained: Mapping[str, nn.Module]) -> None:
    for path, module in trained.items():
        if any(True for _ in adapted_layers(module)):
            raise TargetError(
                f"train_also names {path!r}, but an adapter is on it or inside it; train one or the other"
            )
