"""Report: what the pass saw, what it did and why, as data and as text."""
