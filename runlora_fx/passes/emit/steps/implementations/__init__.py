"""What writes the steps of plans: one file for each implementation, registered by name.

Before -> after: the product ``X A'``, which a plan runs by ``"matmul"`` -> ``permute(A)``, ``mm``.

Invariant: every file of this package is imported with it, so an implementation is one file more.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
