"""Certifiers, one per file."""
