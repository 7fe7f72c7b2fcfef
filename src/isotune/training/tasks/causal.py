"""Causal language modelling: prompt and completion, chats, or plain text in blocks.

- Prompt and completion: `prompt + separator`, then `completion` and the end token, tokenised apart; the prompt is not
  trained on. Too long a row loses the start of its prompt.
- Chats: the model's own template, turn by turn. What the template adds for a turn of the assistant's, up to the end
  token, is trained on, and nothing else. Too long a chat loses its start.
- Text: all texts, an end token after each, as one stream in blocks of `max_length` tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor

from isotune.errors import DataError
from isotune.training.models import load_causal
from isotune.training.tasks.answers import MATCHES, share_right
from isotune.training.tasks.chunked_loss import chunked_loss
from isotune.training.tasks.collator import IGNORED, Example
from isotune.training.tasks.contract import Task, named_or_guessed

if TYPE_CHECKING:
    from isotune.training.data import Row
    from isotune.training.recipe import DataSettings
    from isotune.training.session import TaskSpec


_CHATS = ("messages", "conversations", "conversation", "chat")
_USUAL = (
    "text", *_CHATS, ("prompt", "completion"), ("question", "answer"), ("instruction", "output"),
    ("instruction", "response"), ("prompt", "response"), ("input", "output"), "content",
)  # fmt: skip
"""How data sets call texts, chats, and prompts with their completions."""
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""What some data sets call the speakers."""


def token_losses(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Per row, the summed loss of its trained tokens and their number, shape (batch, 2)."""
    scores = logits[0] if isinstance(logits, tuple) else logits
    return summed_losses(scores[:, :-1], labels[:, 1:])


def summed_losses(scores: Tensor, targets: Tensor) -> Tensor:
    """Of scores (batch, length, vocabulary) per row the summed loss of its targets and their number, (batch, 2)."""
    # Row by row: a batch of logits in fp32 beside the batch itself is what would take the most memory of all.
    losses = [
        torch.nn.functional.cross_entropy(own.float(), wanted, ignore_index=IGNORED, reduction="none")
        for own, wanted in zip(scores, targets, strict=True)
    ]
    return torch.stack([torch.stack(losses).double().sum(1), (targets != IGNORED).double().sum(1)], dim=1)


class CausalLM(Task):
    """Rows of `prompt` and `completion`, of `messages`, or of `text`."""

    answer = "completion"
    named = False
    rows_at_a_time = 8  # their logits are large
    writes = True
    metrics: ClassVar[tuple[str, ...]] = ("perplexity", "loss", *MATCHES)
    metric = "loss"
    asked: ClassVar[tuple[str, ...]] = tuple(MATCHES)
    counted: ClassVar[tuple[str, ...]] = tuple(MATCHES)
    reduced: ClassVar[Callable[..., Any] | None] = staticmethod(token_losses)

    def columns(self, data: DataSettings, found: Sequence[str]) -> dict[str, list[str]]:
        """Prompt and completion, chats, or text: as named, else as the columns are called."""
        if data.prompt is not None:
            return {"prompt": [data.prompt], "completion": [data.completion or "completion"]}
        if data.text is not None:
            return {"text": named_or_guessed(data.text, found, ())}
        if data.messages is not None:
            return {"messages": [data.messages]}
        usual = named_or_guessed(None, found, _USUAL)
        if usual[0] not in found:
            usual = asked_alone(found, _USUAL) or usual
        keys = ("prompt", "completion") if len(usual) == 2 else ("messages",) if usual[0] in _CHATS else ("text",)
        return {key: [name] for key, name in zip(keys, usual, strict=True)}

    def cell(self, key: str, value: Any) -> Any:
        """Chats are lists of messages; the rest is text."""
        if key == "messages":
            return as_chat(value)
        if isinstance(value, (list, dict)):
            raise ValueError(f"a {type(value).__name__} and no text (chats are named with data.messages)")
        return super().cell(key, value)

    def open_cell(self, key: str, value: Any) -> Any:
        """A chat may be one in which nothing is answered yet."""
        return as_chat(value, answered=False) if key == "messages" else self.cell(key, value)

    def is_one_document(self, rows: Sequence[Row]) -> bool:
        """A single row of text."""
        return len(rows) == 1 and "text" in rows[0]

    def load(self, spec: TaskSpec) -> tuple[Any, list[str], TaskSpec]:
        """A language model, which has no head that would be trained by itself."""
        return load_causal(spec.model, spec.dtype, spec.quantization), [], spec

    def examples(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[Example]:
        """What is not trained on is masked; texts are packed into blocks of `spec.max_length`.

        Raises:
            DataError: The tokenizer has no end token to close a completion or a text with, or no chat template;
                answers are to be counted, and the rows ask for none, or share sequences.
        """
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, which a causal-lm task needs")
        if not rows:
            return []
        assert spec.max_length is not None
        if spec.judged_by in self.asked and (spec.packing or "text" in rows[0]):
            what = "packed rows share their sequences" if spec.packing else "plain text asks for nothing"
            raise DataError(
                f"metric: {spec.judged_by} counts answers, and {what}; give prompts or chats, one to a sequence "
                "(data.packing: false)"
            )
        if "text" in rows[0]:
            return _blocks(rows, tokenizer, spec.max_length)
        if "messages" in rows[0]:
            found = _chats(rows, tokenizer, spec.max_length)
        else:
            found = completions(rows, tokenizer, spec.max_length, spec.separator)
        return _packed(found, spec.max_length) if spec.packing else found

    def around_training(self, model: Any) -> AbstractContextManager[Any]:
        """The loss of a batch with many logits comes in chunks."""
        return chunked_loss(model)

    def prompts(self, rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[list[int]]:
        """What the model is asked with, as `prompt_tokens`."""
        return prompt_tokens(rows, tokenizer, spec)

    def measured(self, prediction: transformers.EvalPrediction, spec: TaskSpec) -> dict[str, float]:
        """Of the rows' `token_losses`."""
        return causal_metrics(np.asarray(prediction.predictions))

    def measured_asking(
        self, model: Any, examples: Sequence[Example], processor: Any, spec: TaskSpec, batch_size: int
    ) -> dict[str, float]:
        """The share of answers that are right, where the run is judged by it."""
        if spec.judged_by not in self.asked:
            return {}
        share = share_right(model, processor, examples, MATCHES[spec.judged_by], batch_size)
        return {spec.judged_by: share}

    def predicted(self, rows: Sequence[Row], scores: np.ndarray, spec: TaskSpec) -> list[dict[str, Any]]:
        """Each row with its loss."""
        return [{**row, "loss": float(s[0] / max(s[1], 1))} for row, s in zip(rows, scores, strict=True)]


def asked_alone(found: Sequence[str], usual: Sequence[str | tuple[str, ...]]) -> list[str] | None:
    """The first of the usual pairs of which the prompt is there, as in rows that are to be answered."""
    return next((list(pair) for pair in usual if isinstance(pair, tuple) and pair[0] in found), None)


def prompt_tokens(rows: Sequence[Row], tokenizer: Any, spec: TaskSpec) -> list[list[int]]:
    """What the model goes on from, as in training: of each row the prompt, or the chat up to its last answer."""
    if "messages" in rows[0]:
        _check_template(tokenizer)
        return [asked_in(row["messages"][: _last_turn(row["messages"])], tokenizer) for row in rows]
    found = tokenizer([row["prompt"] + spec.separator for row in rows])["input_ids"]
    return [ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids for ids in found]


def asked_in(messages: list[dict[str, str]], tokenizer: Any) -> list[int]:
    """A chat as tokens, up to where the assistant's next turn begins."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, add_generation_prompt=True, return_dict=False))


def _last_turn(messages: Sequence[dict[str, str]]) -> int:
    return max(place for place, message in enumerate(messages) if message["role"] == "assistant")


def completions(rows: Sequence[Row], tokenizer: Any, max_length: int, separator: str) -> list[Example]:
    """Too long a row keeps its completion, and loses the start of its prompt first."""
    prompts = tokenizer([row["prompt"] + separator for row in rows])["input_ids"]
    completions = tokenizer([row["completion"] for row in rows], add_special_tokens=False)["input_ids"]
    examples: list[Example] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt = prompt[:-1]
        answer = [*completion, tokenizer.eos_token_id][: max_length - 1]
        asked = prompt[-(max_length - len(answer)) :]
        examples.append({"input_ids": asked + answer, "labels": [IGNORED] * len(asked) + answer})
    return examples


def as_chat(value: Any, answered: bool = True) -> list[dict[str, str]]:
    """A cell as a chat, whose messages have a role and a content. Raises ValueError where it is none, or `answered`
    by nobody.
    """
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"a {type(value).__name__} and no list of messages")
    found = []
    for message in value:
        if not isinstance(message, dict):
            raise ValueError(f"a {type(message).__name__} among its messages")
        role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"a message without role and content ({', '.join(message) or 'empty'})")
        found.append({"role": _ROLES.get(role, role), "content": content})
    if answered and not any(message["role"] == "assistant" for message in found):
        raise ValueError("a chat without a turn of the assistant's")
    return found


def _chats(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Example]:
    """Chats in the tokenizer's template, the assistant's turns as labels."""
    _check_template(tokenizer)
    examples: list[Example] = []
    for number, row in enumerate(rows, start=1):
        ids, labels = chat_tokens(row["messages"], tokenizer, f"row {number}")
        if all(label == IGNORED for label in labels[-max_length:]):
            raise DataError(
                f"row {number} ends with more than {max_length} tokens (data.max_length) of no assistant's"
            )
        examples.append({"input_ids": ids[-max_length:], "labels": labels[-max_length:]})
    return examples


def _check_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            "the tokenizer has no chat template, which tells how messages become text; take a model that was made to "
            "chat, or give prompts and completions"
        )


def chat_tokens(
    messages: list[dict[str, str]], tokenizer: Any, where: str, last_only: bool = False
) -> tuple[list[int], list[int]]:
    """A chat as tokens, and its labels: each turn of the assistant's from where it is asked for to its end token.

    With `last_only`, the last turn alone.

    Raises DataError where the template does not grow turn by turn, or the tokenizer cannot tell a token's place.
    """

    def rendered(count: int, asking: bool = False) -> str:
        return tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=asking)

    if not tokenizer.is_fast:
        raise DataError("the tokenizer cannot tell where in a chat a token is; a fast one (tokenizer.json) can")
    text = rendered(len(messages))
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, labels = tokens["input_ids"], [IGNORED] * len(tokens["input_ids"])
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or (last_only and place + 1 < len(messages)):
            continue
        before, after = rendered(place, asking=True), rendered(place + 1)
        if not text.startswith(after) or not after.startswith(before):
            raise DataError(
                f"{where}: the chat template writes what came before anew when a turn is added, so that the turns "
                "cannot be told apart; give prompts and completions"
            )
        for index, (_, end) in enumerate(tokens["offset_mapping"]):
            if len(before) < end <= len(after):
                labels[index] = ids[index]
                if ids[index] == tokenizer.eos_token_id:
                    break
    return ids, labels


def _packed(examples: Sequence[Example], max_length: int) -> list[Example]:
    """Examples one after the other in sequences that hold as many as fit; the first label of each is dropped."""
    found: list[Example] = []
    for example in examples:
        ids, labels = example["input_ids"], [IGNORED, *example["labels"][1:]]
        if found and len(found[-1]["input_ids"]) + len(ids) <= max_length:
            found[-1] = {"input_ids": found[-1]["input_ids"] + ids, "labels": found[-1]["labels"] + labels}
        else:
            found.append({"input_ids": ids, "labels": labels})
    return found


def _blocks(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Example]:
    """All texts, each closed by the end token, as one stream cut every `max_length` tokens."""
    stream: list[int] = []
    for ids in tokenizer([row["text"] for row in rows])["input_ids"]:
        stream.extend(ids if ids and ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id])
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [{"input_ids": block, "labels": block} for block in blocks if len(block) > 1]


def causal_metrics(sums: np.ndarray) -> dict[str, float]:
    """Loss per trained token and its perplexity, from rows of (summed loss, tokens)."""
    loss = float(sums[:, 0].sum() / max(sums[:, 1].sum(), 1))
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
