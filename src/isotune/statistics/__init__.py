"""What is measured on a live model, for merging: Fisher information, second moments."""
