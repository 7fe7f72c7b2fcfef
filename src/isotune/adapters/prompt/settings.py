"""What prefixes and prompts have in common: a number of tokens, and a start that is not the base."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from isotune.adapters.settings import Settings


class PromptSettings(Settings):
    """The options of a method that puts tokens before those of the text."""

    kinds: ClassVar[frozenset[str]] = frozenset({"block"})
    learning_rate: ClassVar[float] = 1e-2
    formula: ClassVar[str] = "tokens * n_in"
    size_option: ClassVar[str | None] = "tokens"

    tokens: int = Field(20, gt=0, description="How many tokens p there are; PEFT's num_virtual_tokens.")

    @property
    def identity_at_start(self) -> bool:
        return False
