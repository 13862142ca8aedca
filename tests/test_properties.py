"""Random linear algebra, at every level: the rewritten graph computes the same, and never for more.

A program is a list of steps over a growing list of matrices; hypothesis shrinks a failing one to
the few steps that matter, and the assertion prints it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from checks import matmul_flops, outputs_and_grads
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.levels.sizes import numel, shape_of
from runlora_fx.passes.levels.torch_functions import TORCH

#: Sizes of the dimensions that matrices have: tokens, features, a rank.
SIZES = (24, 8, 6, 2)

#: Shapes of the inputs, by index of their sizes: enough to chain them in many ways.
INPUTS = ((0, 1), (0, 2), (2, 1), (3, 1), (2, 3), (1, 1), (1, 3), (0, 0))


@dataclass(frozen=True)
class Program:
    """Steps over matrices, each a kind, the index of a matrix and a number."""

    steps: tuple[tuple[str, int, float], ...]
    picks: tuple[int, ...]

    def __call__(self, *inputs: Tensor) -> Tensor:
        values = list(inputs)
        shapes = [tuple(shape) for shape in INPUTS]
        picks = iter(self.picks)

        def choose(fits: Callable[[tuple[int, int]], bool]) -> int | None:
            fitting = [i for i, shape in enumerate(shapes) if fits(shape)]
            return fitting[next(picks) % len(fitting)] if fitting else None

        for kind, i, c in self.steps:
            # Mostly the latest value: long chains are what can be reordered.
            i = len(values) - 1 if i % 4 else (i // 4) % len(values)
            value, shape = values[i], shapes[i]
            if kind == "mul":
                j = choose(lambda other, shape=shape: other[0] == shape[1])
                if j is not None:
                    values.append(value @ values[j])
                    shapes.append((shape[0], shapes[j][1]))
            elif kind == "add":
                j = choose(lambda other, shape=shape: other == shape)
                if j is not None:
                    values.append(value + c * values[j])
                    shapes.append(shape)
            elif kind == "t":
                values.append(value.t())
                shapes.append((shape[1], shape[0]))
            elif kind in ("columns", "rows"):
                side = 1 if kind == "columns" else 0
                j = choose(lambda other, shape=shape, side=side: other[side] == shape[side])
                if j is not None:
                    values.append(value * (1 + c * values[j].amax(1 - side, keepdim=True)))
                    shapes.append(shape)
            elif kind == "scale":
                values.append(value * c)
                shapes.append(shape)
            else:
                values.append(torch.tanh(value))
                shapes.append(shape)
        return values[-1].sin().sum() + values[-3].cos().sum()


steps = st.tuples(
    st.sampled_from(
        ["mul", "mul", "mul", "mul", "add", "add", "t", "scale", "columns", "rows", "tanh"]
    ),
    st.integers(0, 30),
    st.sampled_from([1.0, -1.0, 2.0, 0.5]),
)
programs = st.builds(
    Program,
    st.lists(steps, min_size=4, max_size=12).map(tuple),
    st.lists(st.integers(0, 30), min_size=12, max_size=12).map(tuple),
)
often = settings(
    derandomize=True,
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow],
)


def inputs(*, requires_grad: bool = False) -> list[Tensor]:
    """Random matrices of the shapes that programs start from."""
    generator = torch.Generator().manual_seed(0)
    shapes = [[SIZES[i] for i in shape] for shape in INPUTS]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        .div(3)
        .requires_grad_(requires_grad)
        for shape in shapes
    ]


def flops(gm: fx.GraphModule, dialect: Dialect | None) -> int:
    """FLOPs of the matrix products of a graph that carries example values."""
    if dialect is None:
        return matmul_flops(gm.graph)
    total = 0
    for node in gm.graph.nodes:
        form = dialect.read(node)
        for product in [] if form is None else form.products:
            inner = shape_of(product.left.node)[-1 if not product.left.transposed else 0]
            total += 2 * int(numel(shape_of(node))) * int(inner)
    return total


def check(program: Program, gm: fx.GraphModule, dialect: Dialect | None) -> None:
    """Rewrite a graph of the program: equal outputs, and no more FLOPs."""
    given_inputs = inputs()
    # A rewrite that changes nothing still annotates its copy: the FLOPs of what came.
    before = runlora_fx.rewrite(gm, given_inputs, strict=True, margin=0.999)
    after = runlora_fx.rewrite(gm, given_inputs, strict=True)
    torch.testing.assert_close(
        after(*given_inputs), program(*given_inputs), rtol=1e-10, atol=1e-10, msg=repr(program)
    )
    assert flops(after, dialect) <= flops(before, dialect), program


@often
@given(programs)
def test_torch_functions(program: Program) -> None:
    root = torch.nn.Module()
    tracer = fx.Tracer()
    names = ", ".join(f"x{i}" for i in range(len(INPUTS)))
    fn = eval(f"lambda {names}: program({names})", {"program": program})
    graph = tracer.trace(fn)
    check(program, fx.GraphModule(root, graph), TORCH)


@often
@given(programs)
def test_make_fx(program: Program) -> None:
    check(program, make_fx(program, tracing_mode="fake")(*inputs()), None)


class _Module(torch.nn.Module):
    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program

    def forward(
        self, a: Tensor, b: Tensor, c: Tensor, d: Tensor, e: Tensor, f: Tensor, g: Tensor, h: Tensor
    ) -> Tensor:
        return self.program(a, b, c, d, e, f, g, h)


@settings(often, max_examples=12)
@given(programs)
def test_export(program: Program) -> None:
    exported = torch.export.export(_Module(program), tuple(inputs())).module()
    assert isinstance(exported, fx.GraphModule)
    rewritten = runlora_fx.rewrite(exported, inputs(), strict=True)
    torch.testing.assert_close(
        rewritten(*inputs()), program(*inputs()), rtol=1e-10, atol=1e-10, msg=repr(program)
    )


@settings(often, max_examples=12)
@given(programs)
def test_dynamo(program: Program) -> None:
    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        return runlora_fx.rewrite(gm, strict=True)

    torch._dynamo.reset()
    compiled = torch.compile(_Module(program), backend=backend, fullgraph=True)
    torch.testing.assert_close(
        compiled(*inputs()), program(*inputs()), rtol=1e-10, atol=1e-10, msg=repr(program)
    )


@settings(often, max_examples=16)
@given(programs)
def test_joint_graphs(program: Program) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        _Module(program), backend="runlora_eager", fullgraph=True, options={"runlora.strict": True}
    )
    found = outputs_and_grads(compiled, inputs(requires_grad=True))
    wanted = outputs_and_grads(_Module(program), inputs(requires_grad=True))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, rtol=1e-9, atol=1e-9, msg=f"{name}: {program!r}"
        )
    report = runlora_fx.last_report()
    assert report is not None
    assert report.flops_after <= report.flops_before
    assert not report.refusals, program
