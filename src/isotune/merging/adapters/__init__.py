"""Adapters into one adapter, layer by layer."""
