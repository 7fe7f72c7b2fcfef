"""The documentation's tests share the training tests' tiny models and data, and the reports' results."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("training", "report")]
