"""Many adapters, or many fine-tuned models, into one. One file a rule, in `rules/`."""

from isotune.merging.adapters.merge import Merged, merge
from isotune.merging.registry import rule, rule_names

__all__ = ["Merged", "merge", "rule", "rule_names"]
