"""Published robustness figures to compare with, as package data."""
