"""What could go wrong in merging adapters, found before the work starts and told all at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from isotune.checkpoint.base import StoredBase
from isotune.checkpoint.base_record import Recorded, differences
from isotune.checkpoint.parts import StoredParts
from isotune.checkpoint.read import holds_adapter, read_stored
from isotune.checkpoint.vocabularies import difference, token_ids
from isotune.errors import CheckpointError, IsotuneError, OptionError
from isotune.folders import MODEL_CONFIG
from isotune.merging.adapters.inputs import AdapterInputs, Model
from isotune.merging.adapters.ortha import ortha_conflicts
from isotune.merging.contract import AnyRule, Rule
from isotune.merging.names import model_names
from isotune.statistics.stored import StoredStatistic

T = TypeVar("T")

_SHOWN = 12


class Problems:
    """A list of problems that becomes one error."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def check(self, do: Callable[[], T]) -> T | None:
        """What `do` returns; None where it raises, which is kept."""
        try:
            return do()
        except IsotuneError as error:
            self.found.append(str(error))
            return None

    def add(self, problems: Iterable[str]) -> None:
        """Keep more of them."""
        self.found.extend(problems)

    def tell(self, kind: type[IsotuneError] = CheckpointError) -> None:
        """Raise one error that lists all of them, where there are any."""
        if not self.found:
            return
        if len(self.found) == 1:
            raise kind(self.found[0])
        shown = "".join(f"\n  - {problem}" for problem in self.found[:_SHOWN])
        more = f"\n  - and {len(self.found) - _SHOWN} more" if len(self.found) > _SHOWN else ""
        raise kind(f"these adapters cannot be merged; {len(self.found)} problems:{shown}{more}")


def check_options(
    folders: Sequence[str | Path], rule: AnyRule, weights: Sequence[float] | None, names: Sequence[str] | None
) -> list[str]:
    """The models' names. Raises OptionError unless the models, weights and names fit the rule and each other."""
    problems, count = Problems(), len(folders)
    least, most = rule.models
    if count < least or (most is not None and count > most):
        wanted = (
            f"exactly {least}" if most == least else f"at least {least}" if most is None else f"{least} to {most}"
        )
        problems.add([f"rule {rule.name} merges {wanted} models, and {count} were given"])
    if weights is not None and len(weights) != count:
        problems.add([f"{len(weights)} weights were given for {count} models; give one each, in the same order"])
    if weights is not None and not all(map(math.isfinite, weights)):
        problems.add([f"the weights {', '.join(f'{w:g}' for w in weights)} are not all finite numbers"])
    found = problems.check(lambda: model_names(folders, names))
    problems.tell(OptionError)
    return found or []


def read_models(
    folders: Sequence[str | Path], names: Sequence[str], weights: Sequence[float], base: StoredBase | None
) -> list[Model]:
    """The adapters in the folders, whose layers are read as they are asked for.

    Raises CheckpointError for all of those that cannot be read.
    """

    def read(folder: str | Path, name: str, weight: float) -> Model:
        if (Path(folder) / MODEL_CONFIG).is_file() and not holds_adapter(folder):
            raise CheckpointError(f"{folder} is a full model, and no adapter; merge adapters with adapters")
        stored = read_stored(folder, in_memory=False)
        return Model(name, weight, stored, StoredParts(stored, base))

    problems = Problems()
    found = [problems.check(partial(read, *given)) for given in zip(folders, names, weights, strict=True)]
    problems.tell()
    return [model for model in found if model is not None]


def check_models(inputs: AdapterInputs, rule: AnyRule, force: bool) -> list[str]:
    """Raise CheckpointError, with everything that is wrong in it, unless the rule can merge these adapters.

    Returns notes on what differs among them and may well be meant so.
    """
    problems = Problems()
    if not force:
        problems.add(_bases(inputs.models))
        problems.add(_tokenizers(inputs.models))
    problems.add(_shapes(inputs))
    problems.tell()
    problems.add(_layers(inputs, rule))
    problems.tell()
    return list(_notes(inputs))


def _bases(models: Sequence[Model]) -> Iterator[str]:
    first = models[0]
    for other in models[1:]:
        one, two = first.stored.base.config, other.stored.base.config
        known = one and two and type(one) is type(two)
        if known and (different := _differences(one, two)):
            yield (
                f"{first.stored.path} and {other.stored.path} were made for different base models "
                f"({different}); merge adapters of one base, or say --force"
            )
        elif not known and first.stored.base.name != other.stored.base.name:
            yield (
                f"{first.stored.path} names the base {first.stored.base.name!r}, {other.stored.path} names "
                f"{other.stored.base.name!r}; merge adapters of one base, or say --force"
            )


def _differences(one: Recorded, two: Recorded) -> str:
    """In what two bases differ; empty where in nothing."""
    if isinstance(one, str) or isinstance(two, str):
        return "" if one == two else f"fingerprints {one} and {two}"
    return "; ".join(f"{key}: {a!r} and {b!r}" for key, (a, b) in differences(one, two).items())


def _tokenizers(models: Sequence[Model]) -> Iterator[str]:
    """Where several folders hold a tokenizer, as PEFT writes beside an adapter: it must be the same."""
    found = {model.name: tokens for model in models if (tokens := token_ids(model.stored.path)) is not None}
    for name, tokens in list(found.items())[1:]:
        first = next(iter(found))
        if different := difference(found[first], tokens):
            yield f"the tokenizer of {name} is not that of {first}, {different}; say --force if that does not matter"


def _shapes(inputs: AdapterInputs) -> Iterator[str]:
    if not inputs.paths:
        yield "none of these adapters adapts a layer: they only hold modules trained in full"
    for path in inputs.paths:
        found: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for model in inputs.owners(path):
            try:
                kind = (model.parts.kind(path), tuple(model.parts.shape(path)))
            except IsotuneError as error:
                yield f"{model.name}: {error}"
                continue
            found.setdefault(kind, []).append(model.name)
        if len(found) > 1:
            listed = "; ".join(
                f"{' x '.join(map(str, shape))} ({kind}) in {', '.join(names)}"
                for (kind, shape), names in found.items()
            )
            yield f"the layer {path!r} is not the same in all adapters: {listed}"
        elif inputs.base is not None and found:
            ((_, shape),) = found
            entry = (inputs.owners(path)[0].stored.header or {"sites": {}})["sites"].get(path, {})
            try:
                in_base = inputs.base.shape(path, entry.get("matrix"))
            except CheckpointError as error:
                yield str(error)
                continue
            if list(shape) != in_base:
                yield (
                    f"the layer {path!r} is {' x '.join(map(str, shape))} in the adapters, "
                    f"{' x '.join(map(str, in_base))} in the base"
                )


def _layers(inputs: AdapterInputs, rule: AnyRule) -> Iterator[str]:
    """What only shows when an adapter is rebuilt: one layer of each model stands for its others."""
    if not isinstance(rule, Rule):
        return
    for model in inputs.models:
        if inputs.base is None and model.paths and model.needs_base(model.paths[0]):
            yield (
                f"{model.stored.path}: the change that {model.stored.method} makes depends on the base's weights, "
                f"and the base {model.stored.base.name!r} is not at hand; name its folder with --base"
            )
        if rule.statistic is not None:
            try:
                StoredStatistic(model.stored.path, rule.statistic)
            except CheckpointError as error:
                yield str(error)
    if rule.equal_ranks:
        for path in inputs.paths:
            if len(set(ranks := inputs.ranks(path))) > 1:
                yield f"rule {rule.name} needs equal ranks, and {path!r} has {', '.join(map(str, ranks))}"


def _notes(inputs: AdapterInputs) -> Iterator[str]:
    first = inputs.models[0]
    for other in inputs.models[1:]:
        if set(other.paths) != set(first.paths):
            yield (
                f"{first.name} adapts {len(first.paths)} layers and {other.name} {len(other.paths)}, "
                f"{len(set(first.paths) & set(other.paths))} of them in common; elsewhere a model counts as unchanged"
            )
    yield from dict.fromkeys(
        conflict
        for path in inputs.paths
        for conflict in ortha_conflicts(
            {model.name: model.stored.settings[path] for model in inputs.owners(path)}, inputs.site(path).in_features
        )
    )
    dtypes = {str(model.dtype).removeprefix("torch."): model.name for model in inputs.models if model.dtype}
    if len(dtypes) > 1:
        yield f"the adapters are stored as {' and '.join(dtypes)}; they are merged in float32 or better"
