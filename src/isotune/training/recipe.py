"""The recipe: everything that decides a training run, as YAML, as flags, or from Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from isotune.errors import IsotuneError, nearest


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSettings(_Section):
    """Where the rows come from and which columns mean what."""

    train: str = Field(description="Training rows: a file, a folder, or the id of a dataset on the hub.")
    validation: float | str | None = Field(
        default=0.1, description="A file, a split's name, or the fraction of the training rows to hold out."
    )
    test: str | None = Field(default=None, description="A file, or the name of a split of `train`.")
    subset: str | None = Field(default=None, description="Which configuration of a hub dataset.")
    text: str | list[str] = Field(default="text", description="Column with the text (several are joined).")
    label: str = Field(default="label", description="Column with the label (classification).")
    prompt: str | None = Field(default=None, description="Column with the prompt (causal-lm); not trained on.")
    completion: str | None = Field(default=None, description="Column with the completion (causal-lm).")
    separator: str = Field(default="\n", description="Put between joined columns, and after a prompt.")
    max_length: int | None = Field(
        default=None, ge=2, description="Longest sequence in tokens; by default 256, or the model's limit if less."
    )
    max_train_rows: int | None = Field(default=None, ge=1, description="Train on a seeded sample of the rows.")
    max_eval_rows: int | None = Field(
        default=None, ge=1, description="Validate and test on a seeded sample of the rows each."
    )

    @field_validator("validation")
    @classmethod
    def _fraction(cls, value: float | str | None) -> float | str | None:
        if isinstance(value, (int, float)) and not 0 < value < 1:
            raise ValueError("a fraction lies between 0 and 1; null means no validation rows")
        return value


class Recipe(_Section):
    """A training run. `resolved` gives the recipe with absolute paths, as it is kept in the run's folder."""

    model: str = Field(description="Folder or hub id of the pretrained model; `minilm` for the packaged one.")
    task: Literal["classification", "causal-lm"] = Field(default="classification", description="What to learn.")
    data: DataSettings = Field(description="The rows and their columns.")
    method: dict[str, Any] = Field(default={"name": "hra"}, description="The method's name and its options.")
    targets: str | list[str] = Field(default="attention", description="Which layers: preset, suffixes, regex.")
    exclude: str | list[str] | None = Field(default=None, description="Layers to leave out of the targets.")
    overrides: dict[str, dict[str, Any]] = Field(default={}, description="Method options per target.")
    train_also: list[str] = Field(default=[], description="Modules trained in full beside the adapter.")
    head: Literal["probe", "random"] = Field(
        default="probe", description="Start of the classification head: a converged linear probe, or random."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto", description="From token vectors to one vector (classification)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Data type of the frozen base model."
    )
    training: dict[str, Any] = Field(default={}, description="Fields of transformers.TrainingArguments.")
    save_second_moments: bool = Field(
        default=False, description="Write Adam's second moments beside the adapter, for merging (ota, ffg)."
    )
    output: str = Field(description="Folder for the run; it must not exist, be empty, or be a run's folder.")
    seed: int = Field(default=0, ge=0, description="Seeds the split, the adapter, the head and the order.")

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "hra", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _prompt_with_completion(self) -> Recipe:
        if (self.data.prompt is None) != (self.data.completion is None):
            raise ValueError("data.prompt and data.completion are given together")
        if self.data.prompt is not None and self.task != "causal-lm":
            raise ValueError("data.prompt and data.completion belong to task: causal-lm")
        return self

    def resolved(self) -> Recipe:
        """The same recipe with absolute paths, so that it means the same from any working folder."""
        validation = self.data.validation
        data = self.data.model_copy(
            update={
                "train": _absolute(self.data.train),
                "validation": _absolute(validation) if isinstance(validation, str) else validation,
                "test": _absolute(self.data.test) if self.data.test else None,
            }
        )
        output = str(Path(self.output).expanduser().absolute())
        return self.model_copy(update={"model": _absolute(self.model), "data": data, "output": output})

    def to_yaml(self) -> str:
        """The recipe as YAML that `build_recipe` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def build_recipe(
    path: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Sequence[str] = ()
) -> Recipe:
    """A checked recipe from a YAML file, then dotted `flags`, then `key=value` strings, each over the last.

    Args:
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
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise IsotuneError(f"{source}: {_explain(error)}") from None


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
        if name == "method" and isinstance(here.get(name), str):
            here[name] = {"name": here[name]}
        inner = here.setdefault(name, {})
        if not isinstance(inner, dict):
            raise IsotuneError(f"{dotted}: {name} is not a section that has keys")
        here = inner
    here[last] = value


def _explain(error: ValidationError) -> str:
    """The first problem as one sentence: where, what, and the nearest known key."""
    problem = error.errors(include_url=False)[0]
    section: type[BaseModel] = Recipe
    where: list[str] = []
    for part in problem["loc"]:
        known = section.model_fields
        where.append(str(part))
        if part not in known:
            break
        inner = known[str(part)].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        section = inner
    key = ".".join(where)
    if problem["type"] == "extra_forbidden":
        hint = nearest(where[-1], section.model_fields) or f" Known keys: {', '.join(section.model_fields)}."
        return f"unknown key {key!r}.{hint}"
    if problem["type"] == "missing":
        missing = section.model_fields[where[-1]]
        return f"key {key!r} is missing: {(missing.description or '').rstrip('.')}"
    message = problem["msg"].removeprefix("Value error, ")
    return f"key {key!r}: {message}" if key else message


def _absolute(value: str) -> str:
    """`value` as an absolute path where it names something here; otherwise (a hub id, a split) unchanged."""
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value
