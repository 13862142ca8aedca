"""Public functions: rewrite a graph, show a joint graph, explain a model.

``rewrite(gm, inputs)`` -> a copy of the graph that computes the same for fewer operations.

Invariant: the arguments are not changed, and nothing of ours stays in Dynamo's state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from runlora_fx import history
from runlora_fx._torch_compat import APART, inductor_decompositions, joins_in_place, without_a_trace
from runlora_fx.aot import Parts, aot_backend, copied
from runlora_fx.integrations.install import make_traceable
from runlora_fx.integrations.own_compile import own_backend
from runlora_fx.joint_pass import run
from runlora_fx.keywords import split_keywords
from runlora_fx.late_pass import machine_of
from runlora_fx.options import Options
from runlora_fx.passes.levels.differentiable import level_of
from runlora_fx.passes.read.example_values import annotate
from runlora_fx.report.data import Report, combined
from runlora_fx.without_data import without_data


def rewrite(
    gm: fx.GraphModule, example_inputs: Sequence[Any] | None = None, **options: Any
) -> fx.GraphModule:
    """Rewrite the linear algebra of a graph into its cheapest plan.

    The graph may hold torch functions and modules (``symbolic_trace``, Dynamo)
    or ATen operators (``make_fx``, ``torch.export(...).module()``, AOTAutograd).

    Args:
        gm: The graph; it is not changed.
        example_inputs: Inputs of the shapes to plan for. Not needed where the nodes carry example
            values (``meta["val"]`` or ``meta["example_value"]``).
        **options: See :class:`~runlora_fx.Options`.

    Returns:
        A rewritten copy that shares the parameters. :func:`~runlora_fx.last_report` then returns
        its report.

    Raises:
        ValueError: If an option is not valid, or if there are neither metadata nor example inputs.
    """
    chosen = Options.of(options)
    result = copied(gm)
    annotate(result, example_inputs)
    run(result.graph, level_of(result.graph), chosen)
    result.graph.lint()
    result.recompile()
    return result


def joint_graph(
    model: Callable[..., Any], example_inputs: Sequence[Any], **options: Any
) -> fx.GraphModule:
    """The rewritten forward and backward of a function or module, as one graph to look at.

    Args:
        model: What to trace. It is run once.
        example_inputs: Its positional arguments. Where nothing requires grad (or under ``no_grad``)
            the graph is the inference graph.
        **options: See :class:`~runlora_fx.Options`.

    Returns:
        The graph, called as ``joint(primals, tangents)``: parameters, buffers and arguments in the
        order of their first use, and the gradients of the outputs. An inference graph takes the
        primals one by one.

    Raises:
        ValueError: If an option is not valid.
        RuntimeError: If the model does not trace into one graph.
    """
    seen: list[fx.GraphModule] = []
    backend = aot_backend(Options.of(options), lambda gm: seen.append(copied(gm)))
    make_traceable()
    with without_a_trace():
        torch.compile(model, backend=backend, fullgraph=True, **APART)(*example_inputs)
    if len(seen) != 1:
        raise RuntimeError(f"expected one graph, traced {len(seen)}")
    return seen[0]


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Run a model once, without Inductor, and report what the backend would do with its graphs.

    Later compilations of the model do not depend on this call: it marks no size as dynamic, and it
    does not count against the recompile limit (before torch 2.13 it does where the model was
    compiled before).

    Args:
        model: A module or function. Runs forward once, without Inductor; of meta or fake tensors
            it is only traced, which takes no memory.
        *args: Its arguments.
        **kwargs: Its keyword arguments, and options: a keyword that no ``forward`` of the model
            names is an option of :class:`~runlora_fx.Options`; ``"runlora.NAME"`` is always one.

    Returns:
        One report for all graphs; training graphs where gradients are enabled and needed.

    Raises:
        ValueError: If an option is not valid, or if a keyword is neither an option nor an argument
            of the model.
    """
    options, inputs = split_keywords(model, kwargs)
    report = explained(model, args, inputs, options)
    history.record(report)
    return report


def explained(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: Options,
    compare: Callable[[Parts, Parts], None] | None = None,
) -> Report:
    """The report of what the backend would do with the graphs of a model.

    Args:
        model: A module or function.
        args: Its arguments.
        kwargs: Its keyword arguments.
        options: The options of the pass.
        compare: As for :func:`~runlora_fx.aot.aot_backend`.
    """
    backend = aot_backend(
        options,
        machine=machine_of(options),
        joins_in_place=joins_in_place(),
        decompositions=inductor_decompositions(),
        compare=compare,
    )
    make_traceable()
    with history.collecting() as reports, without_a_trace():
        # A new function for every call, because Dynamo keeps compiled code by backend.
        look = torch.compile(model, backend=own_backend(lambda *graph: backend(*graph)), **APART)
        with without_data(model, args, kwargs) as (positional, named):
            look(*positional, **named)
    return combined(reports)
