"""The ``torch.compile`` backends, found by name through entry points."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config

from runlora_fx import history
from runlora_fx._torch_compat import inductor_compiler
from runlora_fx.integrations.peft_dora import substitute_untraceable
from runlora_fx.integrations.peft_experts import make_experts_traceable
from runlora_fx.joint_pass import RunloraPass, run
from runlora_fx.options import Options, split_options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.report.data import Report

_log = logging.getLogger("runlora_fx")

_HOOK = "joint_custom_pre_pass"

#: Inductor's setting that turns the hook off, as mode="lite" does.
_SWITCH = "use_joint_graph_passes"


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
        mode: As for ``backend="inductor"``.
        options: Inductor's options, and ours as ``runlora.NAME`` (:class:`~runlora_fx.Options`).

    Raises:
        ValueError: If a ``runlora.`` option is unknown or not valid.
        RuntimeError: If an Inductor option is unknown or not valid.
    """
    ours, inductors = split_options(options)
    inductor = inductor_compiler(mode, inductors)
    # Not a patch of the global config: passes set there by the user run first, then ours.
    before = inductor.config.get(_HOOK, getattr(inductor_config, _HOOK))
    own_pass = inductor.config[_HOOK] = RunloraPass(
        ours, _as_sequence(before), parameter_inputs(example_inputs)
    )
    compiled = inductor(gm, example_inputs)
    if not own_pass.ran:
        is_on = inductor.config.get(_SWITCH, getattr(inductor_config, _SWITCH))
        if not is_on:
            _log.warning("runlora did nothing: Inductor's joint passes are off (%s)", _SWITCH)
        history.record(Report(graph="cached" if is_on else "untouched", from_cache=is_on))
    return cast(Callable[..., Any], compiled)


def runlora_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Run the rewritten graphs operator by operator: no compiler needed, easy to debug.

    Args:
        gm: The graph that Dynamo traced.
        example_inputs: Its example inputs.
        options: Ours only, as ``runlora.NAME``.

    Raises:
        ValueError: If an option is unknown or not valid.
    """
    ours, others = split_options(options)
    if others:
        raise ValueError(
            f"backend='runlora_eager' takes runlora.* options only, not {sorted(others)}"
        )
    backend = aot_backend(ours, parameters=parameter_inputs(example_inputs))
    return cast(Callable[..., Any], backend(gm, example_inputs))


def aot_backend(
    options: Options,
    see: Callable[[fx.GraphModule], None] = lambda _: None,
    parameters: Sequence[int] = (),
) -> Callable[..., Any]:
    """AOTAutograd with our pass on its graphs, and no compiler behind it.

    Args:
        options: What is asked of the pass.
        see: Called with every rewritten joint or inference graph.
        parameters: Which of the graph's inputs are parameters; used by the option ``reuse``.
    """

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        run(joint.graph, ATEN, options, may_guard=True, parameters=parameters)
        joint.recompile()
        see(joint)
        return min_cut_rematerialization_partition(joint, inputs, **kwargs)

    def inference(graph_module: fx.GraphModule, _: Any) -> Callable[..., Any]:
        run(graph_module.graph, ATEN, options, may_guard=True, parameters=parameters)
        graph_module.recompile()
        see(graph_module)
        return _as_it_is(graph_module, _)

    backend = aot_autograd(
        fw_compiler=_as_it_is,
        bw_compiler=_as_it_is,
        inference_compiler=inference,
        partition_fn=partition,
        keep_inference_input_mutations=True,
    )
    return cast(Callable[..., Any], backend)


def parameter_inputs(example_inputs: Sequence[Any]) -> list[int]:
    """Which inputs of a graph are parameters; Dynamo passes them as such."""
    return [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]


def _as_it_is(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
    return cast(Callable[..., Any], make_boxed_func(gm))


def _as_sequence(passes: Any) -> tuple[Callable[[fx.Graph], None], ...]:
    if passes is None:
        return ()
    return tuple(passes) if isinstance(passes, list | tuple) else (passes,)


def _reset() -> None:
    """What ``torch._dynamo.reset()`` expects of a backend; the same as Inductor's."""
    inductor_compiler(None, {}).reset()


runlora.reset = _reset  # type: ignore[attr-defined]

# A backend's module is loaded when `torch.compile` is called, before anything is traced.
make_experts_traceable()
substitute_untraceable()
