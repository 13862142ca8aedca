"""Helpers that compare values and gradients of a step, and count what its compiled graphs cost.

Costs are counted, never timed: matmul FLOPs in the graphs that Inductor is about to generate code
for, and the bytes a compiled forward keeps for its backward.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from market import MODELS, Batch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

import runlora_fx

RUNLORA, RUNLORA_EAGER, INDUCTOR = "runlora", "runlora_eager", "inductor"

# A matmul operator -> the position of its left factor (..., k). The last two are made by Inductor
# from frozen weights on CPU. Fused attention is one operator, and not listed.
MATMULS = {
    "aten.mm": 0,
    "aten.bmm": 0,
    "aten.addmm": 1,
    "aten.baddbmm": 1,
    "aten._addmm_activation": 1,
    "mkldnn._linear_pointwise": 0,
    "mkl._mkl_linear": 0,
}

#: Whether Inductor takes a list of joint passes. torch 2.11 takes a single pass.
TAKES_LISTS = not torch.__version__.startswith("2.11.")

P = ParamSpec("P")
T = TypeVar("T")


def scalar_kernels(fn: Callable[P, T]) -> Callable[P, T]:
    """Let Inductor generate scalar C++ inside `fn`: it compiles in about half the time."""
    patched: Callable[P, T] = inductor_config.patch({"cpp.simdlen": 1})(fn)
    return patched


# --- values


def ours(**options: object) -> Any:
    """Our options as `torch.compile` takes them, with `strict`."""
    return {f"runlora.{name}": value for name, value in {"strict": True, **options}.items()}


def compile_whole(model: nn.Module, backend: str) -> nn.Module:
    """Compile again, into one graph: graph breaks and failures of the pass raise errors."""
    torch._dynamo.reset()
    options: Any = None if backend == INDUCTOR else {"runlora.strict": True}
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=options)
    assert isinstance(compiled, nn.Module)
    return compiled


def activation(tokens: int, width: int) -> Tensor:
    """A random input (tokens, width) that requires a gradient; the same one in every call."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))
    return x.requires_grad_()


def compiled(model: nn.Module, backend: str, **policy: object) -> Callable[..., Any]:
    """Compile again, into one graph, with options of ours."""
    torch._dynamo.reset()
    options = None if backend == INDUCTOR else ours(**policy)
    return torch.compile(model, backend=backend, fullgraph=True, options=options)


def run_training(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One forward and backward: "loss", "logits" and the gradient of each trainable parameter."""
    model.zero_grad(set_to_none=True)
    outputs = model(**batch)
    outputs.loss.backward()
    values = {"loss": outputs.loss.detach(), "logits": outputs.logits.detach()}
    for name, weight in _uncompiled(model).named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, f"{name} has no gradient"
            values[name] = weight.grad.clone()
    return values


@torch.no_grad()
def run_inference(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """One forward without gradients: "loss" and "logits"."""
    outputs = model(**batch)
    return {"loss": outputs.loss, "logits": outputs.logits}


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted|| in double precision; absolute if `wanted` is zero."""
    scale = wanted.double().norm().item()
    return float((found.double() - wanted.double()).norm().item() / (scale or 1.0))


def assert_same_values(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], rtol: float
) -> None:
    """Require equal names, equal dtypes and relative errors of at most `rtol`."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype, f"{name}: {found[name].dtype} for {value.dtype}"
    errors = {name: relative_error(found[name], value) for name, value in wanted.items()}
    wrong = {name: error for name, error in errors.items() if not error <= rtol}
    assert not wrong, f"relative error above {rtol}: {wrong}"


def assert_same_outputs_and_grads(
    fn: Callable[..., Any], rewritten: Callable[..., Any], inputs: Sequence[Any], rtol: float
) -> None:
    """Require equal outputs, and equal gradients of `inputs` and of a module's parameters.

    The gradients are those of sum_i <c_i, output_i> with fixed random c_i; an input takes part if
    it requires a gradient.
    """
    wanted = outputs_and_grads(fn, inputs)
    assert_same_values(outputs_and_grads(rewritten, inputs), wanted, rtol)


def outputs_and_grads(fn: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors that `assert_same_outputs_and_grads` compares, by name."""
    inputs = [
        x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
        for x in inputs
    ]
    sources = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor)}
    if isinstance(fn, nn.Module):
        sources.update(_uncompiled(fn).named_parameters())
    sources = {name: x for name, x in sources.items() if x.requires_grad}
    outputs = [y for y in tree_leaves(fn(*inputs)) if isinstance(y, Tensor)]
    values = {f"output {i}": y.detach() for i, y in enumerate(outputs)}

    generator = torch.Generator().manual_seed(1)
    heads = [y for y in outputs if y.requires_grad]
    tangents = [torch.randn(y.shape, generator=generator).to(y) for y in heads]
    if heads:
        grads = torch.autograd.grad(heads, list(sources.values()), tangents, allow_unused=True)
        named = zip(sources, grads, strict=True)
        values |= {f"gradient of {name}": grad for name, grad in named if grad is not None}
    return values


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


# --- costs


def matmul_flops(graph: fx.Graph) -> int:
    """FLOPs of all matrix products of an ATen graph: 2 m k n each [FLOP]."""
    flops = 0
    for node in graph.nodes:
        left = MATMULS.get(str(getattr(node.target, "overloadpacket", "")))
        if left is not None:
            factor = node.args[left]
            assert isinstance(factor, fx.Node)
            flops += 2 * int(node.meta["val"].numel()) * int(factor.meta["val"].shape[-1])
    return flops


@contextmanager
def counting() -> Iterator[list[int]]:
    """List the matmul FLOPs of each graph compiled inside, after Inductor's post-grad passes.

    A training step adds two entries, the forward's and, once its backward has run, the backward's.
    Graph caches are off, since on a hit no pass runs; the cache of compiled C++ kernels stays on.
    """
    flops: list[int] = []
    with (
        inductor_config.patch(
            post_grad_custom_post_pass=lambda graph: flops.append(matmul_flops(graph)),
            fx_graph_cache=False,
        ),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield flops


def assert_gradient_is_the_slope(run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """With the same seed, a step along a direction changes the output by its derivative.

    Args:
        run: Draws random numbers. Its result has the shape of x.
        x: Where the gradient is checked; it requires one.
    """
    weights, direction = torch.randn(x.shape), torch.randn(x.shape)

    def value(at: Tensor) -> Tensor:
        torch.manual_seed(1)
        result: Tensor = (run(at.detach().requires_grad_()) * weights).double().sum()
        return result

    run(x)
    torch.manual_seed(1)
    (gradient,) = torch.autograd.grad((run(x) * weights).sum(), x)
    step = 1e-2
    found = ((value(x + step * direction) - value(x - step * direction)) / (2 * step)).item()
    wanted = (gradient.double() * direction).sum().item()
    assert abs(found - wanted) < 1e-3 * (gradient.norm() * direction.norm()).item()


def saved_bytes(forward: Callable[[], Any], given: Sequence[Tensor]) -> int:
    """Bytes that `forward` saves for its backward, without parameters and inputs [B].

    A storage counts once and in full, and a view of a weight costs nothing. For a compiled forward
    this is what the partitioner chose to save. Compile it before the call.

    Args:
        forward: Runs the forward pass.
        given: Tensors that do not count: parameters, buffers and inputs.
    """
    known = {x.untyped_storage().data_ptr() for x in inner_tensors(given)}
    saved: dict[int, Tensor] = {}  # holds the tensors, because a freed address could be used again

    def keep(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        outputs = forward()
    total = sum(x.untyped_storage().nbytes() for at, x in saved.items() if at not in known)
    del outputs
    return total


def inner_tensors(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The plain tensors, and the plain tensors inside tensor subclasses (quantised weights)."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, _ = tensor.__tensor_flatten__()
            yield from inner_tensors(getattr(tensor, name) for name in names)
        else:
            yield tensor


@dataclass(frozen=True)
class Training:
    """One compiled training step.

    Attributes:
        values: Loss, logits and gradients, as `run_training` returns them.
        flops: Matmul FLOPs of forward and backward after Inductor's passes [FLOP].
        saved: Bytes saved for the backward [B].
        report: The report of the pass; None under plain Inductor.
    """

    values: dict[str, Tensor] = field(repr=False)
    flops: int
    saved: int
    report: "runlora_fx.Report | None"


@scalar_kernels
def compile_training(model: nn.Module, batch: Batch, backend: str) -> Training:
    """Compile one training step of `model`, run it and count its costs.

    Args:
        model: A model that takes `batch` and returns a loss and logits.
        batch: Its inputs.
        backend: `RUNLORA` or `INDUCTOR`.
    """
    with counting() as flops:
        compiled = compile_whole(model, backend)
        values = run_training(compiled, batch)
        report = None if backend == INDUCTOR else runlora_fx.last_report()
        given = [*model.parameters(), *model.buffers(), *batch.values()]
        saved = saved_bytes(lambda: compiled(**batch), given)
        assert len(flops) == 2, f"{len(flops)} graphs, not one forward and one backward"
    return Training(values, sum(flops), saved, report)


@cache
def compiled_training(name: str, rank: int, backend: str) -> Training:
    """`compile_training` of a market model in fp32, once per session."""
    case = MODELS[name]
    return compile_training(case.model(rank), case.batch(), backend)
