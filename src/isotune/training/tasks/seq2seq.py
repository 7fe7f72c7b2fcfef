"""Sequence to sequence: an encoder reads the prompt, a decoder writes the completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from isotune.errors import DataError
from isotune.training.models import load_seq2seq
from isotune.training.tasks.causal import CausalLM, asked_alone, summed_losses
from isotune.training.tasks.collator import IGNORED, Collator, Example, padded
from isotune.training.tasks.contract import named_or_guessed

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

_USUAL = (
    ("prompt", "completion"), ("source", "target"), ("input", "output"), ("question", "answer"),
    ("document", "summary"), ("text", "summary"), ("article", "highlights"), ("dialogue", "summary"),
)  # fmt: skip


class Seq2SeqLM(CausalLM):
    """Rows of `prompt` and `completion`; what is measured is what a causal language model is measured by."""

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """Prompt and completion, as named or by their usual names. Raises DataError for chats and plain text."""
        if data.text is not None or data.messages is not None:
            raise DataError("a seq2seq-lm reads prompts and writes completions; name data.prompt and data.completion")
        prompt, completion = named_or_guessed(None, found, _USUAL)
        if data.prompt is not None:
            prompt, completion = data.prompt, data.completion or completion
        elif prompt not in found:
            prompt, completion = asked_alone(found, _USUAL) or (prompt, completion)
        return {"prompt": [prompt], "completion": [completion]}

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """An encoder-decoder, which has no head that would be trained by itself."""
        return load_seq2seq(spec.model, spec.dtype, spec.quantization), [], spec

    def collator(self, processor: Any) -> Any:
        """Labels are padded to their own longest."""
        return _Apart(processor.pad_token_id)

    def prompts(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[list[int]]:
        """The prompts as the encoder reads them, cut at `spec.max_length` tokens."""
        found: list[list[int]] = tokenizer(
            [row["prompt"] for row in rows], truncation=True, max_length=spec.max_length
        )["input_ids"]
        return found

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Prompt and completion apart, each cut at `spec.max_length` tokens, closed as the tokenizer closes a text.

        Raises DataError where the tokenizer has no end token to close a completion with.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, which a seq2seq-lm task needs")
        if not rows:
            return []
        assert spec.max_length is not None
        written = tokenizer(text_target=[row["completion"] for row in rows])["input_ids"]
        closed = [
            ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id] for ids in written
        ]
        return [
            {"input_ids": ids, "labels": labels[: spec.max_length]}
            for ids, labels in zip(self.prompts(rows, tokenizer, spec), closed, strict=True)
        ]

    @staticmethod
    def reduced(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
        """Per row, the summed loss of its completion's tokens and their number, shape (batch, 2)."""
        return summed_losses(logits[0] if isinstance(logits, tuple) else logits, labels)


class _Apart(Collator):
    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = super().__call__([{"input_ids": example["input_ids"]} for example in examples])
        if "labels" in examples[0]:
            longest = max(len(example["labels"]) for example in examples)
            batch["labels"] = padded([example["labels"] for example in examples], longest, IGNORED)
        return batch
