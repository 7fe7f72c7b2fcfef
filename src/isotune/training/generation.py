"""What a language model answers: to many prompts at a time, or to one chat turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from isotune.errors import DataError, OptionError
from isotune.model.batches import evaluating
from isotune.training.session import Session
from isotune.training.tasks.answers import written
from isotune.training.tasks.causal import CausalLM, asked_in

if TYPE_CHECKING:
    from isotune.training.data import Row


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
    return written(session.model, session.tokenizer, prompts, max_new_tokens, batch_size, advance)


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
