"""Adapters into a few basis models, from which each comes back."""
