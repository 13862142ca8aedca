"""Late pass: what is changed in the graphs that Inductor compiles, after the partitioner.

    machine = machine_of(options)
    joint = RunloraPass(options, machine=machine)           # Inductor's joint_custom_pre_pass
    late = LatePass(joint, machine, strict=False)           # its post_grad_custom_pre_pass

Invariant: a graph without low-rank algebra stays as it is, and so does one in which a change fails.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import fx

from runlora_fx._torch_compat import LATE_PASS, tunes_products
from runlora_fx._torch_names import CustomGraphPass, inductor_config
from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.joint_pass import RunloraPass
from runlora_fx.options import Options
from runlora_fx.passes.emit.graph.transaction import Snapshot
from runlora_fx.passes.upcast import upcast

_log = logging.getLogger("runlora_fx")


def machine_of(options: Options, settings: Mapping[str, Any] | None = None) -> Machine:
    """What plans are made for in graphs that Inductor compiles.

    Args:
        options: The options of the pass.
        settings: The settings of Inductor that the compilation has of its own. Products that it
            tunes are left to it, and so is a compilation with another pass in the place of ours.
    """
    other = (settings or {}).get(LATE_PASS, getattr(inductor_config, LATE_PASS))
    may_upcast = options.upcast and options.numerics != "strict" and options.objective == "time"
    return machine_for(
        options.device,
        use_stored=options.tune != "off",
        upcasts=may_upcast and not other and not tunes_products(settings),
    )


class LatePass(CustomGraphPass):
    """The pass as an object that Inductor can cache by.

    Attributes:
        upcasts: How many products run in float32.
    """

    def __init__(self, joint: RunloraPass, machine: Machine, *, strict: bool) -> None:
        """Prepare the pass.

        Args:
            joint: The pass that has seen the joint graph.
            machine: What its plans are made for.
            strict: Raise what goes wrong.
        """
        self._joint, self._machine, self._strict = joint, machine, strict
        self.upcasts = 0

    def __call__(self, graph: fx.Graph) -> None:
        """Change the graph in place."""
        if not self._joint.found:
            return
        came = Snapshot(graph)
        try:
            self.upcasts += upcast(graph, self._machine.profile)
        except Exception as error:
            came.restore()
            if self._strict:
                raise
            _log.warning(
                "runlora failed and leaves all products in 16 bits; please report this "
                "(options={'runlora.strict': True} raises instead): %s: %s",
                type(error).__name__,
                error,
                exc_info=_log.isEnabledFor(logging.DEBUG),
            )

    def uuid(self) -> Any | None:
        """The key of the pass in Inductor's caches."""
        return self._joint.identity()
