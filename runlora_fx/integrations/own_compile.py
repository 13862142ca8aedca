"""Whose compilation it is: substitutes of functions act in our own compilations only.

``torch.compile(model, backend="aot_eager")`` -> False while the model is traced and run;
``torch.compile(model, backend="runlora")`` -> True.

Invariant: what Dynamo traces for other backends does not depend on this package. Dynamo keeps
compiled code by backend, so the answer needs no guard.
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
    """Mark a backend as ours."""
    setattr(backend, _MARK, True)
    return backend


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_own_compilation() -> bool:
    """Whether the caller is traced, or runs between compiled parts, for a backend of ours.

    Inductor with our pass is one of them. Dynamo calls this function while it traces, and takes the
    result for a constant.
    """
    if os.environ.get(VARIABLE, "1") == "0":
        return False
    backend = active_backend()
    if backend is None:
        return False
    return hasattr(backend, _MARK) or any(
        isinstance(joint_pass, RunloraPass) for joint_pass in joint_passes(backend)
    )
