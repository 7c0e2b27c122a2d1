"""Adapters to other people's model collections, one file per source, named like the package it wraps."""
