"""Devices: what this machine can do, by default, as measured, and as stored.

Each kind of device is one file that :mod:`.registry` finds: ``cpu``, ``cuda``, ``xpu``, ``mps``,
and ``unknown`` for all others. :mod:`.measure` times operations, :mod:`.fit` turns times into a
profile, and :mod:`.machine` says what is stored under which key.
"""
