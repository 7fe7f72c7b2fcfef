"""What the tasks on whole texts share: one text or a pair of them, and a model that gives one vector of scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from isotune.training.classifiers import head_paths, load_classifier, pooling_of
from isotune.training.tasks.collator import Example
from isotune.training.tasks.contract import Task, named_or_guessed

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

TEXTS = (
    "text", "sentence", ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"),
    ("question", "sentence"), ("question", "passage"), ("text1", "text2"), "content", "review", "string",
)  # fmt: skip
"""How data sets call their texts, and their pairs of texts."""
LABELS = ("label", "labels", "score", "class", "category", "intent", "target")
"""How they call what is to be learnt."""


class OnTexts(Task):
    """Rows of `text`, or `text` and `pair`, and `label`."""

    answer = "label"
    probed = True

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """A text or a pair, and the label; three columns of text or more are joined."""
        texts = named_or_guessed(data.text, found, TEXTS)
        pair = {"pair": texts[1:]} if len(texts) == 2 else {}
        return {"text": texts[:1] if pair else texts, **pair, "label": named_or_guessed(data.label, found, LABELS)}

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A model with one output for each label (or a single one), and its pooling."""
        model = load_classifier(
            spec.model, spec.labels, spec.pooling, spec.dtype, spec.backbone, quantization=spec.quantization
        )
        return model, head_paths(model), replace(spec, pooling=pooling_of(model))

    def number(self, label: Any, spec: TaskSpec) -> Any:
        """A row's label as the loss takes it."""
        return label

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Texts cut at `spec.max_length` tokens, of a pair the longer one first; labels where the rows have some."""
        if not rows:
            return []
        first, second = [row["text"] for row in rows], None
        if "pair" in rows[0]:
            second = [row["pair"] for row in rows]
            if not spec.pairs:  # how version 0.1.0 trained
                first, second = [spec.separator.join(both) for both in zip(first, second, strict=True)], None
        tokens = tokenizer(first, second, truncation=True, max_length=spec.max_length)
        names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
        if second is None:
            names = ["input_ids"]
        examples = [dict(zip(names, values, strict=True)) for values in zip(*(tokens[n] for n in names), strict=True)]
        return [
            {**example, "labels": self.number(row["label"], spec)} if "label" in row else example
            for example, row in zip(examples, rows, strict=True)
        ]
