"""Command line: ``python -m runlora_fx calibrate`` and ``python -m runlora_fx demo``.

Invariant: only ``__main__.py`` imports the commands.
"""
