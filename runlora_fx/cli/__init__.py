"""Command line: ``python -m runlora_fx``."""
