"""Train robust image classifiers and bracket their true robustness from both sides."""
