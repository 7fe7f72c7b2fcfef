"""Pure functions of tensors; nothing here knows of layers or adapters."""
