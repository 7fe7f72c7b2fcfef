"""Fixtures of the training tests."""

from coloured import pictures
from tiny import bert, llama, prompts, rows

__all__ = ["bert", "llama", "pictures", "prompts", "rows"]
