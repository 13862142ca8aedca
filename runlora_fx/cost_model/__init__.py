"""Cost model: operations go in, their costs and prices come out.

    MatMul(m=512, k=768, n=16)      ->      {"flops.nn": 12582912, ...}      ->      147 us

``cost.py`` and ``ops.py`` define costs, ``profile.py`` the times of a machine, ``objective.py`` the
price that plans are ranked by. ``store.py`` keeps measurements on disk, and ``published.py`` has
the rates of devices elsewhere. These modules do not import torch. Those of :mod:`.devices` do,
because they query devices and measure.

Invariant: nothing here imports ``passes``. Every other room may import this one.
"""
