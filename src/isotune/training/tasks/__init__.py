"""The tasks a model is trained for, a file each: how rows become tokens, batches, losses, metrics and predictions."""
