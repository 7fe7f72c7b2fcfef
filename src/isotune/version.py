"""The version, which files that are written name."""

__version__ = "0.2.0"
