"""Measurements: what `hfdist bench` runs."""
