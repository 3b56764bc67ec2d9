"""A rank's training loop, and rank 0's part in it: record, save, show, stop."""
