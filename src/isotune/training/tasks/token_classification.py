"""Token classification: a tag for each word, such as the names in a text (BIO tags are scored as whole entities)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from isotune.errors import DataError
from isotune.training.classifiers import head_paths, load_classifier
from isotune.training.tasks.by_label import ByLabel, scored
from isotune.training.tasks.collator import IGNORED, Example
from isotune.training.tasks.contract import Task, as_words, named_or_guessed

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

Entity = tuple[str, int, int]
"""Its kind, and the places of its first and last word."""


class TokenClassification(Task):
    """Rows of `text`, a list of words, and `label`, a list of as many tags."""

    answer = "label"
    metrics = ("f1", "precision", "recall", "accuracy", "loss")
    metric = "f1"

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """Words and tags."""
        words = named_or_guessed(data.text, found, ("tokens", "words", "text"))
        tags = named_or_guessed(data.label, found, ("tags", "ner_tags", "pos_tags", "labels", "label"))
        if len(words) > 1:
            raise DataError(f"data.text: the words are in one column, and not in {' and '.join(words)}")
        return {"text": words, "label": tags}

    def cell(self, key: str, value: Any) -> list[str]:
        """Words, or tags."""
        return as_words(value)

    def labels(self, rows: Sequence[Row], data: DataSettings) -> list[str]:
        """The tags that the rows have, O first. Raises DataError for a single one."""
        _check_lengths(rows, data.train)
        tags = sorted({tag for row in rows for tag in row["label"]}, key=lambda tag: (tag != "O", tag))
        if len(tags) < 2:
            raise DataError(f"{data.train}: every word has the tag {tags[0]!r}; there is nothing to learn")
        return tags

    def check(self, rows: Sequence[Row], labels: Sequence[str], where: str) -> None:
        """Raise DataError for the first row with an unknown tag, or with more or fewer tags than words."""
        _check_lengths([row for row in rows if "label" in row], where)
        known = set(labels)
        for number, row in enumerate(rows, start=1):
            if unknown := sorted(set(row.get("label", ())) - known):
                raise DataError(
                    f"row {number} of {where} has the tag {unknown[0]!r}, which the training rows do not have; "
                    f"they have: {', '.join(labels)}"
                )

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A model that scores the tags of each token."""
        model = load_classifier(
            spec.model, spec.labels, dtype=spec.dtype, of_tokens=True, quantization=spec.quantization
        )
        return model, head_paths(model), spec

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Words cut into tokens; the first token of a word has its tag, the others none.

        Raises:
            DataError: A tokenizer that cannot tell the words of its tokens.
        """
        if not rows:
            return []
        if not tokenizer.is_fast:
            raise DataError("the tokenizer cannot tell which word a token is of; a fast one (tokenizer.json) can")
        words = [row["text"] for row in rows]
        tokens = tokenizer(words, is_split_into_words=True, truncation=True, max_length=spec.max_length)
        numbers = {tag: number for number, tag in enumerate(spec.labels)}
        examples = []
        for index, (row, ids) in enumerate(zip(rows, tokens["input_ids"], strict=True)):
            places = list(first_tokens(tokens.word_ids(index)))
            tags = row.get("label") or [spec.labels[0]] * len(row["text"])
            labels = [IGNORED] * len(ids)
            for place, word in places:
                labels[place] = numbers[tags[word]]
            examples.append({"input_ids": ids, "labels": labels})
        return examples

    @staticmethod
    def reduced(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        """Per token its best tag, its loss, its true tag (-100 where it has none), shape (batch, length, 3)."""
        scores = logits[0] if isinstance(logits, tuple) else logits
        losses = torch.nn.functional.cross_entropy(
            scores.double().transpose(1, 2), labels, ignore_index=IGNORED, reduction="none"
        )
        return torch.stack([scores.argmax(-1).double(), losses, labels.double()], dim=-1)

    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """Of the `reduced` tokens of all rows."""
        return token_metrics(np.asarray(prediction.predictions), spec.labels)

    def by_label(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> ByLabel:
        """Of each kind of entity, or each tag that is none of an entity."""
        hits, found, true = entity_counts(np.asarray(prediction.predictions), spec.labels)
        return {kind: scored(hits[kind], found[kind], true[kind]) for kind in sorted(found | true)}

    def constant(self, train: Sequence[Row], rows: Sequence[Row]) -> dict[str, float]:
        """Of the commonest training tag."""
        (commonest, _), *_ = Counter(tag for row in train for tag in row["label"]).most_common(1)
        tags = [tag for row in rows for tag in row["label"]]
        return {"majority_accuracy": tags.count(commonest) / len(tags)}

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with a tag for each word; None for words beyond the longest sequence. Of BIO tags the entities."""
        found = []
        bio = is_bio(spec.labels)
        for row, kept in zip(rows, scores, strict=True):
            tags: list[str | None] = [spec.labels[int(tag)] for tag, _, true in kept if true != IGNORED]
            tags += [None] * (len(row["text"]) - len(tags))
            found.append({**row, "prediction": tags, **({"entities": _named(row["text"], tags)} if bio else {})})
        return found


def first_tokens(words: Sequence[int | None]) -> Iterator[tuple[int, int]]:
    """The place of each word's first token, and the word's place; `words` has the word of each token."""
    before = None
    for place, word in enumerate(words):
        if word is not None and word != before:
            yield place, word
        before = word


def token_metrics(kept: np.ndarray, labels: Sequence[str]) -> dict[str, float]:
    """Precision, recall and F1 over whole entities, the accuracy of tags, and the mean loss of a tag.

    `kept` (rows, length, 3) is what `reduced` gives. Tags that are no BIO tags count one by one, without O.
    """
    hits, found, true = (counts.total() for counts in entity_counts(kept, labels))
    known = kept[kept[..., 2] != IGNORED]
    scores = scored(hits, found, true)
    return {
        **{name: scores[name] for name in ("f1", "precision", "recall")},
        "accuracy": float((known[:, 0] == known[:, 2]).mean()),
        "loss": float(known[:, 1].mean()),
    }


def entity_counts(kept: np.ndarray, labels: Sequence[str]) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """By kind of entity how many were found where they are, were found at all, and are there.

    `kept` (rows, length, 3) and tags as in `token_metrics`.
    """
    bio = is_bio(labels)
    counts: tuple[Counter[str], Counter[str], Counter[str]] = (Counter(), Counter(), Counter())
    for row in kept:
        row = row[row[:, 2] != IGNORED]
        told, wanted = ([labels[int(tag)] for tag in row[:, column]] for column in (0, 2))
        one, other = (entities(tags) if bio else _single(tags) for tags in (told, wanted))
        for counter, some in zip(counts, (one & other, one, other), strict=True):
            counter.update(kind for kind, _, _ in some)
    return counts


def is_bio(labels: Sequence[str]) -> bool:
    """Whether the tags mark entities that may be several words."""
    return all(tag == "O" or tag[:2] in ("B-", "I-") for tag in labels)


def _named(words: Sequence[str], tags: Sequence[str | None]) -> list[dict[str, Any]]:
    """The entities of a row in their order, with their words; `start` and `end` are its first and last, from 0."""
    found = sorted(entities([tag or "O" for tag in tags]), key=lambda entity: entity[1])
    return [
        {"kind": kind, "text": " ".join(words[start : end + 1]), "start": start, "end": end}
        for kind, start, end in found
    ]


def _single(tags: Sequence[str]) -> set[Entity]:
    return {(tag, place, place) for place, tag in enumerate(tags) if tag != "O"}


def entities(tags: Sequence[str]) -> set[Entity]:
    """The entities of BIO tags: B-X begins one, I-X goes on with it, or begins one where none of X is open."""
    found: set[Entity] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((kind, start, place - 1))
            kind = ""
        if mark in ("B", "I") and name and not kind:
            start, kind = place, name
    return found


def _check_lengths(rows: Sequence[Row], where: str) -> None:
    for number, row in enumerate(rows, start=1):
        if len(row["text"]) != len(row["label"]):
            raise DataError(
                f"row {number} of {where} has {len(row['text'])} words and {len(row['label'])} tags; give one a word"
            )
