"""Devices: a device goes in, its settings, its profile and its measured times come out.

    torch.device("cuda", 0)      ->      a profile: seconds per FLOP, per byte, per launch

Each kind of device is one file that :mod:`.registry` finds: ``cpu``, ``cuda``, ``xpu``, ``mps``,
and ``unknown`` for all others. :mod:`.measure` times operations, :mod:`.fit` turns times into a
profile, :mod:`.machine` loads and stores them, and :mod:`.elsewhere` stands for a device that is
not in this machine. :mod:`.peak` measures the peak memory of a call.

Invariant: only :mod:`.registry` chooses a kind by ``device.type``.
"""
