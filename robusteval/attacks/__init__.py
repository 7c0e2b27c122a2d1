"""Attacks, one per file, and adapters to AutoAttack and Foolbox."""
