"""Sending an evaluation to a leaderboard: bundles that are the same bytes for the same content, and two transports."""
