"""Implementations: the functions that write the steps of plans, registered by name.

    the step ``X A'`` with the implementation ``"matmul"``      ->      permute(a), mm

Invariant: every file of this package is imported with it, so a new implementation is one new file.
"""

import pkgutil
from importlib import import_module

for _module in pkgutil.iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
