"""What a language model writes after prompts, and how much of it is what was wanted."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch

from isotune.errors import OptionError
from isotune.model.batches import evaluating
from isotune.model.switch import tokens
from isotune.training.tasks.collator import IGNORED, Example

Match = Literal["text", "number"]
MATCHES: dict[str, Match] = {"exact_match": "text", "exact_match_number": "number"}
"""The metrics that take written text, and what of it has to be right."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def written(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model, with the adapters in use, writes after each prompt: greedy, up to its end token.

    Args:
        model: A language model, or an encoder-decoder.
        tokenizer: Its own, with a padding token.
        prompts: Token ids; those of like length are answered together.
        max_new_tokens: The longest answer.
        batch_size: Prompts at a time.
        advance: Called with the number of prompts after each batch.

    Raises OptionError for a number below 1.
    """
    if max_new_tokens < 1 or batch_size < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be 1 or more")
    pad, apart = tokenizer.pad_token_id, bool(model.config.is_encoder_decoder)
    device = next(model.parameters()).device
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found = [""] * len(prompts)
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(prompts[index]) for index in chosen)
            ids, mask = [], []
            for own in (list(prompts[index]) for index in chosen):
                more, ones = [pad] * (longest - len(own)), [1] * len(own)
                zeros = [0] * len(more)
                ids.append(own + more if apart else more + own)  # what is written follows the prompt, or is apart
                mask.append(ones + zeros if apart else zeros + ones)
            attended = torch.tensor(mask, device=device)
            tokens(model, attended)
            answers = model.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=attended,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=pad,
            )[:, 0 if apart else longest :]
            for index, answer in zip(chosen, answers, strict=True):
                found[index] = tokenizer.decode(answer, skip_special_tokens=True).strip()
            if advance is not None:
                advance(len(chosen))
    return found


def share_right(model: Any, tokenizer: Any, examples: Sequence[Example], match: Match, batch_size: int) -> float:
    """The share of examples that the model answers rightly, in as many tokens as the longest wanted answer has."""
    asked = [asked_and_wanted(example, model.config.is_encoder_decoder) for example in examples]
    most = max(len(answer) for _, answer in asked)
    answers = written(model, tokenizer, [prompt for prompt, _ in asked], most, batch_size)
    return exact_match(answers, [tokenizer.decode(ids, skip_special_tokens=True) for _, ids in asked], match)


def asked_and_wanted(example: Example, apart: bool) -> tuple[list[int], list[int]]:
    """What is asked, and the last tokens in a row that are trained on; the two are `apart` in an encoder-decoder."""
    ids, labels = example["input_ids"], example["labels"]
    if apart:
        return ids, labels
    end = max(place for place, label in enumerate(labels) if label != IGNORED) + 1
    start = max((place for place, label in enumerate(labels[:end]) if label == IGNORED), default=-1) + 1
    return ids[:start], labels[start:end]


def exact_match(answers: Sequence[str], wanted: Sequence[str], match: Match = "text") -> float:
    """The share of answers that are the wanted ones: to the letter, or by the last number in each."""
    if match == "text":
        hits = [one.strip() == other.strip() for one, other in zip(answers, wanted, strict=True)]
    else:
        numbers = [(last_number(one), last_number(other)) for one, other in zip(answers, wanted, strict=True)]
        hits = [one is not None and one == other for one, other in numbers]
    return sum(hits) / len(hits)


def last_number(text: str) -> float | None:
    """The last number in a text, such as a calculation's result, with commas between its thousands or not."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
