"""Training: settings, objectives' protocol, the inner adversary and the resumable loop."""
