"""isotune: adapt pretrained PyTorch models with orthogonal and low-rank adapters."""

__version__ = "0.1.0"
