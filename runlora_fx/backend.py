"""Backends of ``torch.compile``, which torch finds by name through entry points.

``torch.compile(model, backend="runlora")`` -> Inductor, with our pass on every joint graph.

Invariant: a graph in which nothing is changed compiles as under ``backend="inductor"``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from torch import fx

from runlora_fx import _requirements as _requirements  # first: it names a torch that is too old
from runlora_fx import history, stored_reports
from runlora_fx._torch_compat import JOINT_PASSES, LATE_PASS, inductor_compiler, joint_passes
from runlora_fx._torch_debug import inductor_options, lacks_compiler
from runlora_fx._torch_names import inductor_config
from runlora_fx.aot import aot_backend, parameter_inputs
from runlora_fx.integrations.install import make_traceable
from runlora_fx.integrations.own_compile import own_backend
from runlora_fx.joint_pass import RunloraPass
from runlora_fx.late_pass import LatePass, machine_of
from runlora_fx.options import split_options
from runlora_fx.passes.tune.first_rates import measure_first_rates
from runlora_fx.report.data import Report, combined

_log = logging.getLogger("runlora_fx")

#: Inductor's setting that switches its joint passes off; mode="lite" does so.
_SWITCH = "use_joint_graph_passes"

_NO_COMPILER = (
    "Inductor finds no C++ compiler, which it needs to compile for the CPU. Install one (Debian, "
    "Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), or name "
    "yours in the environment variable CXX, or use backend='runlora_eager', which needs none."
)


def runlora(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile with Inductor after rewriting low-rank algebra into its cheapest plan.

    Used as ``torch.compile(model, backend="runlora", mode=..., options=...)``.

    Args:
        gm: The graph that Dynamo traced.
        example_inputs: Its example inputs.
        mode: The same as for ``backend="inductor"``.
        options: Inductor's options, and ours as ``runlora.NAME`` (:class:`~runlora_fx.Options`).

    Raises:
        ValueError: If an option is unknown, or one of ours is not valid.
        RuntimeError: If an option of Inductor is not valid, or if there is no C++ compiler.
    """
    ours, inductors = split_options(options, inductor_options() if options else ())
    measure_first_rates(gm, ours)
    inductor = inductor_compiler(mode, inductors)
    # The global config stays untouched. Passes that the user set there run before ours.
    before = [p for p in joint_passes(inductor) if not isinstance(p, RunloraPass)]
    machine = machine_of(ours, inductor.config)
    own_pass = RunloraPass(ours, before, parameter_inputs(example_inputs), machine)
    late = LatePass(own_pass, machine, strict=ours.strict)
    settings = {name: value for name, value in inductor.config.items() if name != JOINT_PASSES}
    inductor.config[JOINT_PASSES] = own_pass
    if machine.upcasts:
        inductor.config[LATE_PASS] = late
    try:
        with history.as_one() as parts:
            key = stored_reports.key_of(gm, example_inputs, own_pass.uuid(), settings)
            compiled = inductor(gm, example_inputs)
            if own_pass.ran and parts:
                made = replace(combined(parts), upcast=late.upcasts)
                parts[:] = [stored_reports.stored(key, made)]
    except Exception as error:
        if lacks_compiler(error):
            raise RuntimeError(f"{_NO_COMPILER} Inductor says: {error}") from error
        raise
    if not own_pass.ran:
        if inductor.config.get(_SWITCH, getattr(inductor_config, _SWITCH)):
            history.record(stored_reports.read(key))
        else:
            _log.warning("runlora did nothing: Inductor's joint passes are off (%s)", _SWITCH)
            history.record(Report(graph="untouched"))
    return cast(Callable[..., Any], compiled)


def runlora_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Run the rewritten graphs operator by operator: no compiler needed, easy to debug.

    Args:
        gm: The graph that Dynamo traced.
        example_inputs: Its example inputs.
        mode: None: there is nothing that a mode could choose.
        options: Our options as ``runlora.NAME``, and no others.

    Raises:
        ValueError: If an option is unknown or not valid, or if there is a mode.
    """
    if mode is not None:
        raise ValueError(
            f"backend='runlora_eager' takes no mode, not {mode!r}: it runs graphs operator by "
            f"operator. Modes are Inductor's; backend='runlora' takes them"
        )
    ours, others = split_options(options, inductor_options() if options else ())
    if others:
        raise ValueError(
            f"backend='runlora_eager' takes runlora.* options only, not {sorted(others)}"
        )
    measure_first_rates(gm, ours)
    backend = aot_backend(ours, parameters=parameter_inputs(example_inputs))
    with history.as_one():
        return cast(Callable[..., Any], backend(gm, example_inputs))


def _reset() -> None:
    """Reset Inductor's state; ``torch._dynamo.reset()`` calls this on a backend."""
    inductor_compiler(None, {}).reset()


runlora.reset = _reset  # type: ignore[attr-defined]
own_backend(runlora)
own_backend(runlora_eager)

# `torch.compile` loads this module before it traces anything.
make_traceable()
