"""The graph levels, each as a function that traces a program, rewrites it and runs it.

    LEVELS["joint"](dynamic=False, rewrites=True) -> run(model, inputs) -> outputs

``torch`` is ``symbolic_trace``; ``dynamo`` its graphs of torch functions; ``make_fx`` a forward of
ATen operators, in place operators included; ``step`` the same of outputs and gradients; ``export``
``torch.export``; ``joint`` the backend on forward and backward. These plan by FLOPs. ``timed`` is
``joint`` with plans by time for a GPU, stacks and recomputed activations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import runlora_fx
from runlora_fx.aot import aot_backend
from runlora_fx.options import Options
from tests.fuzz.compare import strides_of

Level: TypeAlias = Literal["torch", "dynamo", "make_fx", "step", "export", "joint", "timed"]

#: Runs a model on inputs.
Run: TypeAlias = Callable[[nn.Module, list[Any]], Any]

_OPTIONS: dict[str, Any] = {"strict": True, "objective": "flops"}


def eager_of(level: Level) -> Run:
    """How a program is run without a graph, to compare a level with."""
    if level == "step":
        return lambda model, inputs: _step_of(model)(*_tensors(model, inputs))
    return lambda model, inputs: model(*inputs)


def _rewrite(gm: fx.GraphModule, inputs: list[Any] | None, rewrites: bool) -> fx.GraphModule:
    return runlora_fx.rewrite(gm, inputs, **_OPTIONS) if rewrites else gm


def _by_torch(dynamic: bool, rewrites: bool) -> Run:
    def run(model: nn.Module, inputs: list[Any]) -> Any:
        return _rewrite(fx.symbolic_trace(model), inputs, rewrites)(*inputs)

    return run


def _by_dynamo(dynamic: bool, rewrites: bool) -> Run:
    return _compiled(dynamic, backend=lambda gm, _: _rewrite(gm, None, rewrites))


def _by_joint(dynamic: bool, rewrites: bool) -> Run:
    if not rewrites:
        return _compiled(dynamic, backend="aot_eager")
    options = {f"runlora.{name}": value for name, value in _OPTIONS.items()}
    return _compiled(dynamic, backend="runlora_eager", options=options)


def _by_time(dynamic: bool, rewrites: bool) -> Run:
    if not rewrites:
        return _by_joint(dynamic, rewrites)
    options = Options(strict=True, device="h100")
    return _compiled(dynamic, backend=aot_backend(options, joins_in_place=True))


def _compiled(dynamic: bool, **arguments: Any) -> Run:
    torch._dynamo.reset()
    compiled: list[Any] = []

    def run(model: nn.Module, inputs: list[Any]) -> Any:
        if not compiled:
            compiled.append(torch.compile(model, fullgraph=True, dynamic=dynamic, **arguments))
        return compiled[0](*inputs)

    return run


def _by_export(dynamic: bool, rewrites: bool) -> Run:
    made: list[fx.GraphModule] = []

    def run(model: nn.Module, inputs: list[Any]) -> Any:
        if not made:
            dims: Any = None
            if dynamic:
                dims = [{d: torch.export.Dim.AUTO for d in range(x.dim())} for x in inputs]
            exported = torch.export.export(model, tuple(inputs), dynamic_shapes=dims)
            gm = exported.module()
            assert isinstance(gm, fx.GraphModule)
            made.append(_rewrite(gm, None if dynamic else inputs, rewrites))
        return made[0](*inputs)

    return run


def _by_make_fx(dynamic: bool, rewrites: bool) -> Run:
    return _by_tracing("make_fx", dynamic, rewrites)


def _by_step(dynamic: bool, rewrites: bool) -> Run:
    return _by_tracing("step", dynamic, rewrites)


def _by_tracing(level: Level, dynamic: bool, rewrites: bool) -> Run:
    made: list[fx.GraphModule] = []

    def run(model: nn.Module, inputs: list[Any]) -> Any:
        if not made:
            made.append(_rewrite(traced(level, model, inputs, dynamic=dynamic), None, rewrites))
        with torch.no_grad():
            return made[0](*_tensors(model, inputs))

    return run


def traced(
    level: Level, model: nn.Module, inputs: list[Any], *, dynamic: bool = False
) -> fx.GraphModule:
    """The graph of ``make_fx`` or ``step``, as it is given to the package."""
    fn = _step_of(model) if level == "step" else _forward_of(model)
    return _traced(fn, _tensors(model, inputs), dynamic)


def has_promised_strides(graph: fx.GraphModule, model: nn.Module, inputs: list[Any]) -> bool:
    """True if every call of a graph returns tensors with the strides of its example values.

    Some fake kernels of torch promise other strides than the real ones give, such as that of
    ``native_dropout_backward``. Whoever asks for strides then gets a wrong answer.
    """
    found = _Strides(graph)
    with torch.no_grad():
        found.run(*_tensors(model, inputs))
    return found.are_as_promised


class _Strides(fx.Interpreter):
    """Runs a graph and compares the strides of all results with those of its example values."""

    are_as_promised = True

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, and compare."""
        result = super().run_node(n)
        pairs = zip(tree_leaves(result), tree_leaves(n.meta.get("val")), strict=False)
        for real, example in pairs:
            if isinstance(real, Tensor) and isinstance(example, Tensor):
                self.are_as_promised &= strides_of(real) == strides_of(example)
        return result


def _traced(fn: Callable[..., Any], tensors: list[Tensor], dynamic: bool) -> fx.GraphModule:
    """A function as a graph of ATen operators; the random state stays as it was."""
    state = torch.get_rng_state()
    graph = make_fx(fn, tracing_mode="symbolic" if dynamic else "fake")(*tensors)
    torch.set_rng_state(state)
    return graph


def _forward_of(model: nn.Module) -> Callable[..., Any]:
    """A model as a function of what it holds and of its inputs."""
    names = _names(model)

    def forward(*tensors: Tensor) -> Any:
        state = dict(zip(names, tensors, strict=False))
        return functional_call(model, state, tensors[len(names) :])

    return forward


def _step_of(model: nn.Module) -> Callable[..., Any]:
    """A training step: outputs, and the gradients of the tensors that require one."""
    names = _names(model)

    def step(*tensors: Tensor) -> Any:
        # Copies in the graph: a leaf that requires a gradient cannot be mutated, others can.
        leaves = [x.detach().requires_grad_() if x.dim() > 0 else x for x in tensors]
        state = dict(zip(names, (1 * x for x in leaves), strict=False))
        outputs = functional_call(model, state, tuple(1 * x for x in leaves[len(names) :]))
        heads = [y for y in outputs if y.requires_grad]
        if not heads:
            return [y.detach() for y in outputs]
        loss = sum(y.double().sin().sum() for y in heads)
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
        return [y.detach() for y in outputs], [g for g in grads if g is not None]

    return step


def _tensors(model: nn.Module, inputs: list[Any]) -> list[Tensor]:
    """What a model holds and is given, without gradients."""
    every = [*model.parameters(), *model.buffers(), *inputs]
    return [x.detach() for x in every]


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers())]


LEVELS: dict[Level, Callable[[bool, bool], Run]] = {
    "torch": _by_torch,
    "dynamo": _by_dynamo,
    "make_fx": _by_make_fx,
    "step": _by_step,
    "export": _by_export,
    "joint": _by_joint,
    "timed": _by_time,
}
