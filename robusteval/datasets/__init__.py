"""Datasets, one per file; `open.open_dataset` finds them by name."""
