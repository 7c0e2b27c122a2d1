"""Exporters: a report in the forms that other people's leaderboards and tools take, one file each; pure and offline."""
