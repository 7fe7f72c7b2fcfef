"""The recipe: everything that decides a training run, as YAML, as flags, or from Python."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator

from isotune.recipes import Section, checked

T = TypeVar("T")

_FIELD_TASKS = {
    "text-classification": "classification",
    "sequence-classification": "classification",
    "text-regression": "regression",
    "ner": "token-classification",
    "text-generation": "causal-lm",
    "text2text-generation": "seq2seq-lm",
    "summarization": "seq2seq-lm",
    "translation": "seq2seq-lm",
    "dpo": "preference",
}
"""What the tasks are called elsewhere."""
_WRITING = ("causal-lm", "seq2seq-lm", "preference")
"""The tasks whose rows have prompts and completions."""


class DataSettings(Section):
    """Where the rows come from and which columns mean what."""

    train: str = Field(description="Training rows: a file, a folder, or the id of a dataset on the hub.")
    validation: float | str | None = Field(
        default=0.1, description="A file, a split's name, or the fraction of the training rows to hold out."
    )
    test: float | str | None = Field(
        default=None, description="A file, the name of a split of `train`, or the fraction of its rows to hold out."
    )
    subset: str | None = Field(default=None, description="Which configuration of a hub dataset.")
    text: str | list[str] | None = Field(
        default=None,
        description="Column with the text, or two with a pair of texts; three or more are joined, and so are those "
        "of a causal-lm. By default one of the usual names (text, sentence, premise and hypothesis, ...).",
    )
    image: str | None = Field(default=None, description="Column with the image (image-classification).")
    audio: str | None = Field(default=None, description="Column with the sound (audio-classification).")
    label: str | None = Field(
        default=None, description="Column with the label, the number, or the tags; by default one of the usual names."
    )
    positive: str | None = Field(
        default=None,
        description="Of two labels the one whose F1 is the metric f1 (classification); by default the rarer of the "
        "training rows, the second where both are as common.",
    )
    prompt: str | None = Field(default=None, description="Column with the prompt (causal-lm); not trained on.")
    completion: str | None = Field(default=None, description="Column with the completion (causal-lm).")
    chosen: str | None = Field(default=None, description="Column with the better answer (preference).")
    rejected: str | None = Field(default=None, description="Column with the worse answer (preference).")
    messages: str | None = Field(
        default=None, description="Column with a chat (causal-lm): its assistant's turns are trained on."
    )
    packing: bool = Field(
        default=False,
        description="Prompts and chats (causal-lm): several of them in a sequence of max_length.",
    )
    separator: str = Field(default="\n", description="Put between joined columns, and after a prompt.")
    quoting: Literal["auto", "minimal", "none"] = Field(
        default="auto",
        description="Of CSV and TSV: whether quotes enclose fields (minimal) or are characters like others (none).",
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Longest sequence in tokens; by default 256, or the model's limit if less."
    )
    image_size: int | None = Field(
        default=None,
        ge=1,
        description="Height and width in pixels to which images are stretched, whole (image-classification); by "
        "default what the model's image processor does.",
    )
    max_seconds: float | None = Field(
        default=None,
        gt=0,
        description="Longest clip in seconds (audio-classification); longer ones are cut. By default 30, or the "
        "model's limit if less.",
    )
    max_train_rows: int | None = Field(default=None, ge=1, description="Train on a seeded sample of the rows.")
    max_eval_rows: int | None = Field(
        default=None, ge=1, description="Validate and test on a seeded sample of the rows each."
    )

    @field_validator("positive", mode="before")
    @classmethod
    def _as_label(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("validation", "test", mode="before")
    @classmethod
    def _share(cls, value: Any) -> Any:
        return float(value) if isinstance(value, str) and re.fullmatch(r"0?\.\d+", value) else value

    @field_validator("validation", "test")
    @classmethod
    def _fraction(cls, value: float | str | None) -> float | str | None:
        return _checked_fraction(value, "a fraction lies between 0 and 1; null means no rows")


class ForgettingSettings(Section):
    """Rows that training does not see, on which the model is measured before and after it; see `forgetting`."""

    train: str | None = Field(
        default=None, description="Classification: rows of another task, to fit a linear probe on."
    )
    test: float | str = Field(
        default=0.3,
        description="Rows to measure on: a file, or for a classification a split of `train` or the fraction of its "
        "rows to hold out; for causal-lm general text, for seq2seq-lm another task's rows.",
    )
    subset: str | None = Field(default=None, description="Which configuration of a hub dataset.")
    text: str | list[str] | None = Field(default=None, description="Column with the text, as in data.")
    label: str | None = Field(default=None, description="Column with the label (classification), as in data.")
    prompt: str | None = Field(default=None, description="Column with the prompt (seq2seq-lm), as in data.")
    completion: str | None = Field(default=None, description="Column with the completion (seq2seq-lm), as in data.")
    separator: str = Field(default="\n", description="Put between joined columns.")
    max_rows: int | None = Field(
        default=None, ge=1, description="At most so many training rows and so many test rows, a seeded sample."
    )
    max_length: int | None = Field(
        default=None, ge=2, description="Longest sequence in tokens; by default 256, or the model's limit if less."
    )
    batch_size: int = Field(default=64, ge=1, description="Rows at a time.")
    l2: float = Field(default=1e-2, gt=0, description="Regularisation of the probe, on standardised features.")
    seed: int = Field(default=0, ge=0, description="Of what is held out and sampled.")
    points: int = Field(
        default=0,
        ge=0,
        description="Measure it so many times along each seed's run, too, so that methods can be set beside each "
        "other at equal scores; 0: at its end alone.",
    )

    @field_validator("test")
    @classmethod
    def _fraction(cls, value: float | str) -> float | str:
        return _checked_fraction(value, "a fraction lies between 0 and 1")

    def resolved(self) -> ForgettingSettings:
        """The same settings with absolute paths."""
        test = _absolute(self.test) if isinstance(self.test, str) else self.test
        return self.model_copy(update={"train": self.train and _absolute(self.train), "test": test})


class Recipe(Section):
    """A training run. `resolved` gives the recipe with absolute paths, as it is kept in the run's folder."""

    model: str = Field(
        description="Folder, GGUF file or hub id of the pretrained model; `minilm`, `smollm2`, `focus-vit` and "
        "`whisper-tiny.en` come with packages."
    )
    task: Literal[
        "classification",
        "regression",
        "token-classification",
        "image-classification",
        "audio-classification",
        "causal-lm",
        "seq2seq-lm",
        "preference",
    ] = Field(default="classification", description="What to learn.")
    metric: str | None = Field(
        default=None,
        description="What runs are judged by: methods compared, the report's headline, and the best checkpoint with "
        "training.load_best_model_at_end; by default the first of the task's metrics.",
    )
    data: DataSettings = Field(description="The rows and their columns.")
    method: dict[str, Any] = Field(
        default={"name": "hra"}, description="The method's name and its options; `full` trains the whole model."
    )
    targets: str | list[str] | None = Field(
        default=None,
        description="Which layers: preset, suffixes, regex; by default the method's, mostly attention.",
    )
    exclude: str | list[str] | None = Field(default=None, description="Layers to leave out of the targets.")
    overrides: dict[str, dict[str, Any]] = Field(default={}, description="Method options per target.")
    train_also: list[str] = Field(default=[], description="Modules trained in full beside the adapter.")
    head: Literal["probe", "random"] = Field(
        default="probe", description="Start of the head: a converged linear probe, or random."
    )
    pooling: Literal["auto", "mean", "cls", "last"] = Field(
        default="auto", description="From token vectors to one vector (classification, regression)."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="Data type of the frozen base model."
    )
    quantization: Literal["int8", "nf4", "llm-int8"] | None = Field(
        default=None,
        description="Quantise the frozen base: int8 (torchao's, weights only), nf4 or llm-int8 (bitsandbytes').",
    )
    dpo_beta: float = Field(
        default=0.1, gt=0, description="Preference: how dear it is to leave the reference, the model without adapter."
    )
    training: dict[str, Any] = Field(default={}, description="Fields of transformers.TrainingArguments.")
    optimizer: dict[str, Any] | None = Field(
        default=None,
        description="The name of one of isotune's optimizers (muon, ...), and its options; else training.optim.",
    )
    save_second_moments: bool = Field(
        default=False, description="Write Adam's second moments beside the adapter, for merging (ota, ffg)."
    )
    output: str = Field(description="Folder for the run; it must not exist, be empty, or be a run's folder.")
    seed: int = Field(default=0, ge=0, description="Seeds the split, the adapter, the head and the order.")

    @field_validator("task", mode="before")
    @classmethod
    def _in_the_fields_words(cls, value: Any) -> Any:
        return _FIELD_TASKS.get(value, value) if isinstance(value, str) else value

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        return {"name": "hra", **value} if isinstance(value, dict) else value

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer_named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _prompt_with_completion(self) -> Recipe:
        if self.task != "preference" and (self.data.prompt is None) != (self.data.completion is None):
            raise ValueError("data.prompt and data.completion are given together")
        if self.task not in _WRITING and (self.data.prompt is not None or self.data.messages is not None):
            raise ValueError("data.prompt, data.completion and data.messages belong to task: causal-lm or seq2seq-lm")
        if sum(named is not None for named in (self.data.text, self.data.prompt, self.data.messages)) > 1:
            raise ValueError("name one of data.text, data.prompt (with data.completion) and data.messages")
        return self

    def resolved(self) -> Recipe:
        """The same recipe with absolute paths, so that it means the same from any working folder."""
        validation = self.data.validation
        data = self.data.model_copy(
            update={
                "train": _absolute(self.data.train),
                "validation": _absolute(validation) if isinstance(validation, str) else validation,
                "test": _absolute(self.data.test) if isinstance(self.data.test, str) else self.data.test,
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
    """A checked training recipe; see `isotune.recipes.checked`."""
    return checked(Recipe, path, flags, sets)


def with_plain_columns(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe's fields with `text: text` and `label: label` left to be found, as they would be.

    Version 0.1.0 named them by default: its runs and comparisons go on under the recipes that they were started with.
    """
    return {
        key: with_plain_columns(value) if isinstance(value, dict)
        else None if key in ("text", "label") and value == key
        else value
        for key, value in recipe.items()
    }  # fmt: skip


def _absolute(value: str) -> str:
    """`value` as an absolute path where it names something here; otherwise (a hub id, a split) unchanged."""
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def _checked_fraction(value: T, message: str) -> T:
    if isinstance(value, (int, float)) and not 0 < value < 1:
        raise ValueError(message)
    return value
