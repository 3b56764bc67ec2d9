"""What `hfdist init` copies."""
