"""The rules by which changes of the same weights become one change."""
