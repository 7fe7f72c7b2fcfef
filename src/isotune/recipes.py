"""Recipes: YAML, flags and `--set key=value` over it, checked by a pydantic model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from isotune.errors import IsotuneError, nearest


class Section(BaseModel):
    """A recipe, or a section of one."""

    model_config = ConfigDict(extra="forbid", frozen=True)


R = TypeVar("R", bound=Section)

_NAMED = ("method", "rule")
"""Sections that may be given as a name alone."""


def checked(
    recipe: type[R],
    path: str | Path | None = None,
    flags: Mapping[str, Any] | None = None,
    sets: Sequence[str] = (),
) -> R:
    """A checked recipe from a YAML file, then dotted `flags`, then `key=value` strings, each over the last.

    Args:
        recipe: The kind of recipe.
        path: A recipe file, or nothing where the flags say it all.
        flags: Dotted keys and their values, such as `{"data.train": "rows.csv"}`; None values are left out.
        sets: `--set` arguments such as `"method.rank=16"`; the value is read as YAML.

    Raises:
        IsotuneError: The file cannot be read, or a key or a value is wrong; the message names it.
    """
    source = str(path) if path is not None else "the command line"
    raw = _read_yaml(Path(path)) if path is not None else {}
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(raw, key, value)
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not key:
            raise IsotuneError(f"--set takes key=value, not {item!r}; for example --set method.rank=16")
        try:
            _assign(raw, key.strip(), parse_yaml(text))
        except yaml.YAMLError as error:
            raise IsotuneError(f"--set {item}: the value is not YAML: {error}") from None
    try:
        return recipe.model_validate(raw)
    except ValidationError as error:
        raise IsotuneError(f"{source}: {_explain(recipe, error)}") from None


def parse_yaml(text: str) -> Any:
    """YAML with 1.2's scalars: `1e-3` is a number; `no`, `on` and `2024-01-01` are words."""
    return yaml.load(text, Loader=_Loader)


class _Loader(yaml.SafeLoader):
    pass


_TAG = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in pairs if tag.removeprefix(_TAG) not in ("bool", "float", "timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = parse_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IsotuneError(f"no recipe file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise IsotuneError(f"{path}: the recipe cannot be read: {error}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise IsotuneError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def _assign(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    here = raw
    for name in parents:
        if name in _NAMED and isinstance(here.get(name), str):
            here[name] = {"name": here[name]}
        inner = here.setdefault(name, {})
        if not isinstance(inner, dict):
            raise IsotuneError(f"{dotted}: {name} is not a section that has keys")
        here = inner
    here[last] = value


def _explain(recipe: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one sentence: where, what, and the nearest known key."""
    # A key that is not known explains one that is missing.
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    section = recipe
    where: list[str] = []
    for part in problem["loc"]:
        where.append(str(part))
        if isinstance(part, int):  # which of a list of sections
            continue
        if part not in section.model_fields:
            break
        kind = section.model_fields[part].annotation
        inner = [one for one in (kind, *get_args(kind)) if isinstance(one, type) and issubclass(one, BaseModel)]
        if not inner:
            break
        section = inner[0]
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        hint = nearest(where[-1], section.model_fields) or f" Known keys: {', '.join(section.model_fields)}."
        return f"unknown key {key!r}.{hint}"
    if problem["type"] == "missing":
        missing = section.model_fields.get(where[-1])
        return f"key {key!r} is missing: {((missing and missing.description) or '').rstrip('.')}".removesuffix(": ")
    message = problem["msg"].removeprefix("Value error, ")
    return f"key {key!r}: {message}" if key else message
