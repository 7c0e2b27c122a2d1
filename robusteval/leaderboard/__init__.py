"""A leaderboard that one can run: reports come in as hostile input, are checked, and are shown as one page."""
