"""AOTAutograd with our pass on its graphs, and no compiler behind it.

Joint graph of forward and backward -> the rewritten one, cut in two by torch's partitioner; both
parts run operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from runlora_fx.integrations.own_compile import own_backend
from runlora_fx.joint_pass import run
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN


def aot_backend(
    options: Options,
    see: Callable[[fx.GraphModule], None] = lambda _: None,
    parameters: Sequence[int] = (),
) -> Callable[..., Any]:
    """A backend that rewrites graphs and runs them operator by operator.

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
    return own_backend(cast(Callable[..., Any], backend))


def parameter_inputs(example_inputs: Sequence[Any]) -> list[int]:
    """Which inputs of a graph are parameters; Dynamo passes them as such."""
    return [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]


def _as_it_is(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
    return cast(Callable[..., Any], make_boxed_func(gm))
