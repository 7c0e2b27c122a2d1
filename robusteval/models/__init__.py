"""Classifiers: architectures (one file per plug-in), their weights on disk, and adapters to model zoos."""
