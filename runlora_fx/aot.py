"""AOT backend: AOTAutograd and our pass, without a compiler.

Joint graph of forward and backward -> the rewritten joint graph, cut into forward and backward by
torch's partitioner.

Invariant: both parts run operator by operator, so that they can be debugged.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from torch import fx, nn

from runlora_fx._torch_names import aot_autograd, make_boxed_func
from runlora_fx._torch_names import min_cut_rematerialization_partition as cut
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.integrations.own_compile import own_backend
from runlora_fx.joint_pass import run
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN


class Parts(NamedTuple):
    """A joint graph, cut by torch's partitioner.

    Attributes:
        forward: Its outputs are the results, and what is saved for the backward.
        backward: Reads what was saved.
        results: How many outputs are results.
    """

    forward: fx.GraphModule
    backward: fx.GraphModule
    results: int


def aot_backend(
    options: Options,
    see: Callable[[fx.GraphModule], None] = lambda _: None,
    parameters: Sequence[int] = (),
    *,
    machine: Machine | None = None,
    joins_in_place: bool = False,
    decompositions: Mapping[Any, Callable[..., Any]] | None = None,
    compare: Callable[[Parts, Parts], None] | None = None,
) -> Callable[..., Any]:
    """A backend that rewrites graphs and runs them operator by operator.

    Args:
        options: The options of the pass.
        see: Called with every rewritten joint or inference graph.
        parameters: Positions of the inputs that are parameters; used by the option ``reuse``.
        machine: What plans are made for; the stored profiles of this machine if None.
        joins_in_place: True if the graphs are to be those that Inductor would compile: it joins
            matrices without copies.
        decompositions: By operator, how it is composed of others before the pass sees it.
        compare: Called with the parts of every joint graph as it came and as it was rewritten. The
            graph that came is cut into parts for it, which takes time.
    """

    def rewrite(gm: fx.GraphModule) -> None:
        run(
            gm.graph,
            ATEN,
            options,
            machine,
            may_guard=True,
            joins_in_place=joins_in_place,
            parameters=parameters,
        )
        gm.recompile()
        see(gm)

    def partition(joint: fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        results = kwargs["num_fwd_outputs"]
        came = None if compare is None else cut(copied(joint), inputs, **kwargs)
        rewrite(joint)
        parts = cut(joint, inputs, **kwargs)
        if compare is not None and came is not None:
            compare(Parts(*came, results), Parts(*parts, results))
        return parts

    def inference(gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        rewrite(gm)
        return _uncompiled(gm, inputs)

    backend = aot_autograd(
        fw_compiler=_uncompiled,
        bw_compiler=_uncompiled,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=None if decompositions is None else dict(decompositions),
        keep_inference_input_mutations=True,
    )
    return own_backend(cast(Callable[..., Any], backend))


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that has its own graph and shares the parameters."""
    graph = fx.Graph()
    made = graph.graph_copy(gm.graph, {}, return_output_node=True)
    assert isinstance(made, tuple)
    value, output = made
    graph.output(value).meta = copy.copy(output.meta)
    graph._codegen = copy.copy(gm.graph._codegen)
    return fx.GraphModule(gm, graph)


def parameter_inputs(example_inputs: Sequence[Any]) -> list[int]:
    """The positions of the inputs that are parameters."""
    return [i for i, x in enumerate(example_inputs) if isinstance(x, nn.Parameter)]


def _uncompiled(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
    return cast(Callable[..., Any], make_boxed_func(gm))
