"""Many adapters, or many fine-tuned models, into one. One file a rule, in `rules/`."""

from isotune.merging.adapters.merge import merge
from isotune.merging.record import MergeRecord, read_record
from isotune.merging.registry import rule, rule_names

__all__ = ["MergeRecord", "merge", "read_record", "rule", "rule_names"]
