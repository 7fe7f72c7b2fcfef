"""A comparison's tests share the training tests' tiny models and data, and the command line's fixture."""

from tiny import bert, llama, prompts, rows

__all__ = ["bert", "llama", "prompts", "rows"]
