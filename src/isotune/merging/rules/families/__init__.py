"""What rules of the same kind have in common."""
