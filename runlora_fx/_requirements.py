"""Requirements: the oldest torch that this package runs on, checked before anything is imported.

torch 2.10 -> ``ImportError: runlora-fx needs torch 2.11 or newer; torch 2.10.0 is installed ...``

Invariant: importing this module raises an error exactly if torch is too old.
"""

from __future__ import annotations

import re

import torch

_OLDEST = (2, 11)


def _check(installed: str) -> None:
    """Check a version of torch.

    Raises:
        ImportError: If it is too old. A version that is no number passes.
    """
    numbers = re.match(r"(\d+)\.(\d+)", installed)
    if numbers is not None and (int(numbers[1]), int(numbers[2])) < _OLDEST:
        needed = ".".join(map(str, _OLDEST))
        raise ImportError(
            f"runlora-fx needs torch {needed} or newer; torch {installed} is installed: "
            f"pip install --upgrade 'torch>={needed}'"
        )


_check(torch.__version__)
