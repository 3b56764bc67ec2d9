"""A run's folder: where it lies, its files, how it is stopped."""
