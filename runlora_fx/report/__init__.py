"""Reports: what the pass found, what it changed and why, as data and as text."""
