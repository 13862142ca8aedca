"""Own compilations: substitutes act only if the current compilation is for one of our backends.

``torch.compile(model, backend="aot_eager")`` -> False while the model is traced and run;
``torch.compile(model, backend="runlora")`` -> True.

Invariant: what Dynamo traces for other backends does not depend on this package. The answer needs
no guard, because Dynamo keeps the compiled code of each backend apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from runlora_fx._torch_compat import active_backend, joint_passes
from runlora_fx.joint_pass import RunloraPass

#: Set to 0, this environment variable switches all substitutes off.
VARIABLE = "RUNLORA_SUBSTITUTES"

_MARK = "_runlora_traces_substitutes"

_Backend = TypeVar("_Backend", bound=Callable[..., Any])


def own_backend(backend: _Backend) -> _Backend:
    """Mark a backend as ours, and return it."""
    setattr(backend, _MARK, True)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_own_compilation() -> bool:
    """True if the caller is traced, or runs between compiled parts, for a backend of ours.

    Inductor with our pass counts as one. Dynamo calls this function while it traces, and treats the
    result as a constant.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    backend = active_backend()
    if backend is None:
        return False
    return hasattr(backend, _MARK) or any(
        isinstance(joint_pass, RunloraPass) for joint_pass in joint_passes(backend)
    )
