"""Tune: prices from the machine, and plans timed on it."""
