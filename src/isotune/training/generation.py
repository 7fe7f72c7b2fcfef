"""What a language model answers: to many prompts at a time, or to one chat turn by turn."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from isotune.errors import DataError, OptionError
from isotune.model.batches import evaluating
from isotune.model.switch import tokens
from isotune.training.session import Session
from isotune.training.tasks.causal import CausalLM, asked_in

if TYPE_CHECKING:
    from isotune.training.data import Row

Match = Literal["text", "number"]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """What the session's model, with the adapters in use, answers to each prompt: greedy, up to its end token.

    Args:
        session: Of a model that writes.
        prompts: Token ids, of its task's `prompts`; those of like length are answered together.
        max_new_tokens: The longest answer.
        batch_size: Prompts at a time.
        advance: Called with the number of prompts after each batch.

    Raises:
        OptionError: The task writes no text, or a number below 1.
    """
    if not isinstance(session.task, CausalLM):
        raise OptionError(f"a {session.spec.task} model generates no text; its predictions are what it has to say")
    if max_new_tokens < 1 or batch_size < 1:
        raise OptionError(f"max_new_tokens={max_new_tokens} and batch_size={batch_size} must be 1 or more")
    model, pad = session.model, session.tokenizer.pad_token_id
    apart = bool(model.config.is_encoder_decoder)  # the prompt is not before what is written; it is padded behind
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
                ids.append(own + more if apart else more + own)
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
                found[index] = session.tokenizer.decode(answer, skip_special_tokens=True).strip()
            if advance is not None:
                advance(len(chosen))
    return found


def prompts_and_answers(rows: Sequence[Row], session: Session) -> tuple[list[list[int]], list[str] | None]:
    """The token ids of each row's prompt, and the wanted answers, where the rows have them.

    Raises DataError for rows of plain text, which ask for nothing.
    """
    task = session.task
    if not isinstance(task, CausalLM) or not rows or "text" in rows[0]:
        raise DataError("plain text asks for nothing; give rows with a prompt, or chats (data.prompt, data.messages)")
    prompts = task.prompts(rows, session.tokenizer, session.spec)
    if "messages" in rows[0]:
        turns = [[message for message in row["messages"] if message["role"] == "assistant"] for row in rows]
        return prompts, [own[-1]["content"] for own in turns]
    return prompts, [row["completion"] for row in rows] if "completion" in rows[0] else None


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


class Talk:
    """A chat with a session's model; `messages` has what was said."""

    def __init__(self, session: Session, system: str | None = None) -> None:
        """`system`: what the model is told before the chat begins.

        Raises OptionError where the model is no causal language model.
        """
        if not isinstance(session.task, CausalLM) or session.model.config.is_encoder_decoder:
            raise OptionError(f"a {session.spec.task} model cannot chat; take a run with task: causal-lm")
        self.session, self.task = session, session.task
        self.start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self.start)

    def reset(self) -> None:
        """Begin anew."""
        self.messages = list(self.start)

    def ask(self, text: str, max_new_tokens: int = 256, temperature: float = 0.0, streamer: Any = None) -> str:
        """The model's answer, which the chat keeps; `streamer` (of transformers) gets it word by word.

        A model without a chat template is given what was said as prompts and completions, as it was trained.
        """
        self.messages.append({"role": "user", "content": text})
        ids = torch.tensor([self._tokens()], device=next(self.session.model.parameters()).device)
        how = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        with torch.no_grad(), evaluating(self.session.model):
            found = self.session.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens, streamer=streamer,
                pad_token_id=self.session.tokenizer.pad_token_id, **how,
            )  # fmt: skip
        answer = self.session.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()
        self.messages.append({"role": "assistant", "content": answer})
        return str(answer)

    def _tokens(self) -> list[int]:
        tokenizer, spec = self.session.tokenizer, self.session.spec
        if getattr(tokenizer, "chat_template", None):
            return asked_in(self.messages, tokenizer)
        return self.task.prompts([{"prompt": self.messages[-1]["content"]}], tokenizer, spec)[0]
