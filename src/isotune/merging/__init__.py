"""Many adapters, or many fine-tuned models, into one. One file a rule, in `rules/`."""
