"""One Markdown page a method, from its module's docstring, its options and what probing it shows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import BaseModel

    from isotune.adapters.settings import Settings
    from isotune.model.catalogue import MethodInfo

_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


def method_page(found: MethodInfo, kind: type[Settings]) -> str:
    """The page of one method: `found` is what probing `kind`, its settings class, showed."""
    module = sys.modules[kind.__module__]
    title, *about = (module.__doc__ or found.name).strip().split("\n\n")
    parts = [f"# {found.name}", prose(title), *map(prose, about), _use(found, kind), _can(found)]
    if rows := [option_row(name, schema) for name, schema in properties(kind).items()]:
        header = ["option", "values", "default", "meaning"]
        parts += ["## Options", markdown_table(header, rows)]
    if kind.exempt:
        laws = [[prose(name.replace("_", " ")), prose(reason)] for name, reason in sorted(kind.exempt.items())]
        parts += [
            "## Laws that it does not keep",
            "Every method is tested by the same laws; it declares those that it cannot keep, and why.",
            markdown_table(["law", "reason"], laws),
        ]
    parts.append(f"Source: `src/{kind.__module__.replace('.', '/')}.py`")
    return "\n\n".join(parts) + "\n"


def _use(found: MethodInfo, kind: type[Settings]) -> str:
    size = kind.size_option or ""
    value = kind.model_fields[size].default if size in kind.model_fields else None
    given = f"{size}={value}" if value is not None else ""
    public = f"{kind.__name__}({given})"
    recipe = f"{{name: {found.name}, {size}: {value}}}" if given else found.name
    return f"""## Use

```python
import isotune
from {kind.__module__} import {kind.__name__}

isotune.adapt(model, {public}, targets="{kind.usual_targets}")
```

```yaml title="in a recipe"
method: {recipe}
```"""


def _can(found: MethodInfo) -> str:
    """What probing shows, at the default options."""
    lora = f"yes; rank of the change: {found.lora_rank}" if found.lora_rank else "no"
    rows = [
        ["trained in a layer with W of shape (n_out, n_in)", f"`{found.parameters}`"],
        ["layers", ", ".join(found.kinds)],
        ["a fresh adapter changes nothing", said(found.identity_at_start)],
        ["folds into the weight and the bias", said(found.foldable)],
        ["exported as an exact LoRA", lora],
        ["a saved adapter loads in PEFT", said(found.peft)],
        ["learning rate of a recipe without one", f"{found.learning_rate:g}"],
    ]
    return f"## What it can do\n\n{markdown_table(['at the default options', 'probed'], rows)}"


def properties(kind: type[BaseModel]) -> dict[str, dict[str, Any]]:
    """The schema of each field, what it refers to filled in."""
    schema = kind.model_json_schema()
    named = schema.get("$defs", {})
    return {
        name: {**own, **named.get(own.get("$ref", "").rpartition("/")[2], {})}
        for name, own in schema.get("properties", {}).items()
    }


def option_row(name: str, schema: dict[str, Any]) -> list[str]:
    """A row of a table: the option, what it may be, its default, and what it means."""
    default = schema.get("default")
    shown = "-" if default is None else f"`{_written(default)}`"
    return [f"`{name}`", _values(schema), shown, prose(schema.get("description", ""))]


def _written(default: Any) -> str:
    """A default as YAML has it."""
    plain = isinstance(default, str) and default.strip()
    return str(default) if plain else json.dumps(default, ensure_ascii=False)


def _values(schema: dict[str, Any]) -> str:
    """What an option may be, in words: its type and bounds, or the words it takes."""
    if "anyOf" in schema:
        return " or ".join(_values(one) for one in schema["anyOf"] if one.get("type") != "null")
    if words := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{word}`" for word in words)
    bounds = " and ".join(f"{sign} {schema[key]}" for key, sign in _BOUNDS.items() if key in schema)
    names = {
        "boolean": "`true`, `false`", "integer": "whole number", "string": "text", "array": "list",
        "object": "section",
    }  # fmt: skip
    return f"{names.get(schema.get('type', ''), schema.get('type', 'any'))} {bounds}".strip()


def prose(text: str) -> str:
    """A docstring's paragraph as Markdown: indented equations stay, signs that mean something there are escaped."""
    if text.startswith("    "):
        return text
    pieces = re.split(r"(`[^`]*`)", text)
    escaped = [
        piece if index % 2 else re.sub(r"([\\*_<\[\]|])", r"\\\1", piece) for index, piece in enumerate(pieces)
    ]
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"arXiv [\1](https://arxiv.org/abs/\1)", "".join(escaped))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def said(answer: bool | None) -> str:
    """An answer of the prober's."""
    return "-" if answer is None else "yes" if answer else "no"
