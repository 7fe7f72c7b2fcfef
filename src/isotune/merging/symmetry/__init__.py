"""Changes of basis that leave a model as it is, and what they let one model take over from another."""
