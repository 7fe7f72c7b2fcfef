"""A comparison's tests share the training tests' tiny models and data, and the command line's fixture."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny import bert, llama, prompts, rows

__all__ = ["bert", "llama", "prompts", "rows"]
