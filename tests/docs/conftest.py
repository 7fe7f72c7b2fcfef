"""The documentation's tests share the training tests' tiny models and data."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
