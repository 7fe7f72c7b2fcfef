"""Preference: of two answers to a prompt the better one is learnt, by direct preference optimisation.

    loss = -log σ(β [log π(c|x) - log π₀(c|x) - log π(r|x) + log π₀(r|x)])

for a prompt x, the chosen answer c and the rejected one r; π is the adapted model, and π₀ the same with the adapter
switched off, so that no second model is in memory.

Source: "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023, arXiv
2305.18290.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

import isotune
from isotune.errors import DataError
from isotune.training.tasks.causal import CausalLM, as_chat, chat_tokens, completions, summed_losses
from isotune.training.tasks.collator import IGNORED, Example, padded
from isotune.training.tasks.contract import as_text, named_or_guessed

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec

_PAIR = ("chosen", "rejected")


class Preference(CausalLM):
    """Rows of `prompt`, `chosen` and `rejected`, or of chats that differ in their last answer."""

    answer = "chosen"
    metrics = ("accuracy", "margin", "loss")
    metric = "accuracy"
    counted = ("accuracy",)
    asked = ()
    rows_at_a_time = 4
    writes = False
    has_reference = True
    reduced = None

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """The two answers, and the prompt where there is one; text, on which what was forgotten is measured."""
        if data.text is not None:
            return super().columns(data, found)
        pair = {name: named_or_guessed(getattr(data, name), found, (name,)) for name in _PAIR}
        prompt = named_or_guessed(data.prompt, found, ("prompt", "question", "instruction"))
        return {"prompt": prompt, **pair} if data.prompt or prompt[0] in found else pair

    def cell(self, key: str, value: Any) -> Any:
        """Answers are text, or chats that end with one."""
        return as_chat(value) if key in _PAIR and isinstance(value, (list, tuple)) else as_text(value)

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A language model; its own loss is not asked for."""
        model, head, spec = super().load(spec)
        model.accepts_loss_kwargs = False  # this loss is a mean over the batch
        return model, head, spec

    def collator(self, processor: Any) -> PairCollator:
        """The two answers side by side."""
        return PairCollator(processor.pad_token_id)

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """Both answers after the prompt, as tokens, with the prompt masked; see `CausalLM`.

        Raises DataError for answers that are text without a prompt, or chats that differ before their last answer.
        """
        if not rows or "text" in rows[0]:
            return super().examples(rows, tokenizer, spec)
        assert spec.max_length is not None
        found = []
        for number, row in enumerate(rows, start=1):
            both = [self._answered(row, name, tokenizer, spec, number) for name in _PAIR]
            found.append({name: [one[name] for one in both] for name in ("input_ids", "labels")})
        return found

    def _answered(self, row: Row, name: str, tokenizer: Any, spec: TaskSpec, number: int) -> Example:
        """One of the answers after the prompt."""
        assert spec.max_length is not None
        if name not in row:
            raise DataError(f"row {number} has no {name} answer, and a preference is between two (data.{name})")
        answer = row[name]
        if isinstance(answer, str):
            if "prompt" not in row:
                raise DataError(f"row {number} has answers and no prompt (data.prompt)")
            asked = {"prompt": row["prompt"], "completion": answer}
            return completions([asked], tokenizer, spec.max_length, spec.separator)[0]
        if answer[:-1] != row[_PAIR[0]][:-1] or answer[-1]["role"] != "assistant":
            raise DataError(f"the chats of row {number} differ in more than the assistant's last answer")
        ids, labels = chat_tokens(answer, tokenizer, f"row {number}", last_only=True)
        return {"input_ids": ids[-spec.max_length :], "labels": labels[-spec.max_length :]}

    def loss(self, model: Any, inputs: Mapping[str, Tensor], spec: TaskSpec) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and the margin of each row (batch,), `β` included."""
        flat = {name: tensor.flatten(0, 1) for name, tensor in inputs.items()}
        labels = flat.pop("labels")
        isotune.tokens(model, flat.get("attention_mask"))
        ours = self._log_probabilities(model, flat, labels)
        with torch.no_grad(), isotune.disabled(model):
            theirs = self._log_probabilities(model, flat, labels)
        gained = (ours - theirs).reshape(-1, 2)
        margins = spec.dpo_beta * (gained[:, 0] - gained[:, 1])
        loss = -torch.nn.functional.logsigmoid(margins).mean().to(torch.float32)
        return loss, {"loss": loss, "logits": margins.detach()[:, None]}

    def _log_probabilities(self, model: Any, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """Of each sequence the log-probability of its answer, shape (2 batch,)."""
        return -summed_losses(model(**inputs).logits[:, :-1], labels[:, 1:])[:, 0]

    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """How often the chosen answer gained more, by how much, and the loss."""
        margins = np.asarray(prediction.predictions, dtype=np.float64).reshape(-1)
        return {
            "accuracy": float((margins > 0).mean()),
            "margin": float(margins.mean()),
            "loss": float(np.logaddexp(0, -margins).mean()),
        }

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with the answer that gained more, and the margin."""
        return [
            {**row, "prediction": _PAIR[int(score <= 0)], "margin": float(score)}
            for row, score in zip(rows, scores.reshape(-1), strict=True)
        ]


class PairCollator:
    """Pads the two sequences of each example to the longest of the batch."""

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `labels` of shape (batch, 2, longest); of plain text (batch, longest)."""
        pairs = isinstance(examples[0]["input_ids"][0], list)
        ids, labels = (
            [row for example in examples for row in (example[name] if pairs else [example[name]])]
            for name in ("input_ids", "labels")
        )
        longest = max(map(len, ids))
        batch = {
            "input_ids": padded(ids, longest, self.pad_token_id),
            "attention_mask": padded([[1] * len(row) for row in ids], longest, 0),
            "labels": padded(labels, longest, IGNORED),
        }
        return {name: tensor.reshape(-1, 2, longest) for name, tensor in batch.items()} if pairs else batch
