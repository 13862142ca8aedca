"""Comparison: nobody is timed who computes something else.

    errors = compared(task, values)      by contender, or NotTheSame

Without dropout, outputs and gradients are compared with eager PEFT in a wider dtype: a contender
may err by twice what eager PEFT errs in the task's own dtype. With dropout they are compared with
PEFT + Inductor at the same seed, because eager mode draws other masks.

Invariant: the reference is never one of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from measuring.contenders import BASELINE, EAGER
from measuring.steps import Contender, Step, Task, error

#: What a relative error may be beyond twice that of eager PEFT, by the task's dtype; and at all
#: where masks are drawn.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
HALF_TOLERANCE, MASKED_TOLERANCE = 0.01, 0.05


class NotTheSame(Exception):
    """A contender computes something else than the reference."""


def compared(task: Task, values: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The largest relative errors of contenders' outputs and gradients.

    Args:
        task: What they ran.
        values: By contender; that of PEFT + Inductor must be among them.

    Raises:
        NotTheSame: If an error is too large.
    """
    allowed = MASKED_TOLERANCE
    wanted = values[BASELINE]
    if not task.dropout:
        dtype = task.inputs[0].dtype
        wide = torch.float32 if dtype.itemsize < 4 else torch.float64
        wanted = Step(Contender(None), task.exact(wide)).values()
        eager = Step(Contender(None), task).values()
        allowed = 2 * error(eager, wanted) + TOLERANCE.get(dtype, HALF_TOLERANCE)
    errors: dict[str, float] = {}
    for name, found in values.items():
        if task.dropout and name == EAGER:
            continue
        errors[name] = wrong = error(found, wanted)
        if not wrong <= allowed:
            raise NotTheSame(f"{name}: relative error {wrong:.3g}, allowed {allowed:.3g}")
    return errors
