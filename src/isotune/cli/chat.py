"""`isotune chat`: talk to what a run trained."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

Flag = typer.Option

_HELP = """Talk to a language model that a run trained, or to a pretrained one by its name.

What you type is answered as it is written. /base switches the adapter off, and on again; /reset begins anew;
/quit, or the end of the input, ends.

Examples:

  isotune chat runs/one

  isotune chat smollm2 --system 'Answer in one sentence.'

  echo 'What is 12 times 12?' | isotune chat runs/one
"""


def chat_command(
    path: Annotated[str, typer.Argument(metavar="RUN_OR_MODEL", help="A run, an adapter, a model, or its name.")],
    model: Annotated[str | None, Flag(help="The pretrained model, if it has moved.")] = None,
    system: Annotated[str | None, Flag(help="What the model is told before the chat.")] = None,
    max_new_tokens: Annotated[int, Flag(min=1, help="The longest answer, in tokens.")] = 256,
    temperature: Annotated[float, Flag(min=0, help="0: always the likeliest word; above: drawn.")] = 0.0,
    force: Annotated[bool, Flag("--force", help="Accept a base model unlike the adapter's own.")] = False,
) -> None:
    import isotune
    from isotune.training.generation import Talk
    from isotune.training.opening import open_any
    from isotune.training.progress import quiet_libraries

    quiet_libraries()
    talk = Talk(open_any(path, task="causal-lm", model=model, force=force), system)
    people = sys.stdin.isatty()
    adapted = bool(isotune.describe(talk.session.model))
    bare = False
    while True:
        if people:
            print("you (base)> " if bare else "you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text = line.strip()
        if not line or text == "/quit":
            break
        if text == "/reset":
            talk.reset()
        elif text == "/base":
            bare = not bare
            said = "is off" if bare else "is on again"
            print(f"the adapter {said}" if adapted else "there is no adapter", file=sys.stderr)
        elif text.startswith("/"):
            print("/base, /reset and /quit are all there is", file=sys.stderr)
        elif text:
            _answer(talk, text, bare and adapted, max_new_tokens, temperature)


def _answer(talk: Any, text: str, bare: bool, max_new_tokens: int, temperature: float) -> None:
    from contextlib import nullcontext

    from transformers import TextStreamer

    import isotune

    streamer = TextStreamer(talk.session.tokenizer, skip_prompt=True, skip_special_tokens=True)
    with isotune.disabled(talk.session.model) if bare else nullcontext():
        talk.ask(text, max_new_tokens, temperature, streamer)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("chat", help=_HELP)(chat_command)
