"""Fixtures of the training tests."""

from tiny import bert, llama, prompts, rows

__all__ = ["bert", "llama", "prompts", "rows"]
