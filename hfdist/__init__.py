"""hfdist."""
