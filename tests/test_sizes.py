"""Symbolic sizes: questions about them add no guard and raise nothing; graphs keep their gain."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_outputs_and_grads
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import runlora_fx
from runlora_fx import joint_pass
from runlora_fx.passes.levels import sizes
from runlora_fx.passes.levels.cuts import Cut, Repetition, permuted_cut, recut, repetition

STRICT: Any = {"runlora.strict": True}


def _node(shape: tuple[int, ...], env: ShapeEnv) -> fx.Node:
    """A node with an example tensor whose sizes are all symbols."""
    mode = FakeTensorMode(shape_env=env)
    node = fx.Graph().placeholder("x")
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * len(shape))
    node.meta["val"] = mode.from_tensor(torch.empty(shape), symbolic_context=context)
    return node


def test_questions_about_symbols_add_no_guards() -> None:
    env = ShapeEnv()
    node = _node((6, 4, 8), env)
    a, b, c = shape = sizes.shape_of(node)
    before = len(env.guards)
    assert sizes.equal(sizes.numel((a, b)), sizes.numel((b, a)))
    assert not sizes.equal(a, b)
    assert not sizes.is_one(a)
    assert sizes.index_of(b, shape) == 1
    assert sizes.same_strides(node, node)
    assert recut(shape, Cut(0, 2), (sizes.numel((a, b)), c)) == Cut(0, 1)
    assert permuted_cut(shape, Cut(0, 2), (2, 0, 1)) == (Cut(0, 1), True)
    assert repetition((c,), shape, Cut(0, 2)) == Repetition(Cut(0, 0), rows=True)
    assert repetition((a, b, 1), shape, Cut(0, 2)) == Repetition(Cut(0, 2), rows=False)
    assert repetition((b,), shape, Cut(0, 2)) is None
    assert len(env.guards) == before


def test_a_size_that_a_view_computes_is_the_size_it_equals() -> None:
    """Of ``x.view(s, -1, i)``: (s * t) // s, and Max(1, ...) in its strides."""
    node = _node((6, 4, 8), ShapeEnv())
    val = node.meta["val"]
    s, t, i = val.shape
    assert sizes.dim_of((s * s) // s) == sizes.dim_of(s)
    assert sizes.dim_of((6 * s * t * i) // (2 * s)) == sizes.dim_of(3 * t * i)
    assert sizes.dim_of((s + 1) // s) != 1
    assert sizes.dim_of((s * t) // 2) != sizes.dim_of(s * t)
    assert sizes.dim_of(i * torch.sym_max(1, (s * s) // s)) == sizes.dim_of(i * s)
    assert sizes.dim_of(torch.sym_max(1, s - 5)) != sizes.dim_of(s - 5)  # it may be 0


@pytest.mark.parametrize(
    ("shape", "cut", "onto", "moved"),
    [
        ((1, 0, 3), Cut(1, 2), (0, 3), Cut(0, 1)),
        ((2, 5, 0), Cut(0, 2), (10, 0), Cut(0, 1)),
        ((0, 4, 3), Cut(0, 2), (0, 3), Cut(0, 1)),
        ((0, 4, 3), Cut(0, 2), (0, 4), None),
    ],
)
def test_a_tensor_without_elements_is_cut_by_its_extents(
    shape: tuple[int, ...], cut: Cut, onto: tuple[int, ...], moved: Cut | None
) -> None:
    assert recut(shape, cut, onto) == moved


@pytest.mark.parametrize(
    ("shape", "cut", "onto", "moved"),
    [
        ((3, 7), Cut(0, 1), (3, 1, 7), Cut(0, 2)),
        ((2, 1, 8), Cut(1, 2), (2, 1, 8), Cut(1, 2)),
        ((2, 1, 1), Cut(1, 2), (2, 1, 1), Cut(1, 2)),
        ((5, 1), Cut(0, 1), (5, 1, 1), Cut(0, 2)),
        ((1, 8), Cut(0, 1), (8,), Cut(0, 0)),
        ((6, 1), Cut(0, 1), (6,), Cut(0, 1)),
    ],
)
def test_a_dimension_of_size_one_behind_the_rows_is_one_of_theirs(
    shape: tuple[int, ...], cut: Cut, onto: tuple[int, ...], moved: Cut
) -> None:
    assert recut(shape, cut, onto) == moved


@pytest.mark.parametrize(
    ("term", "shape", "cut", "lies"),
    [
        ((7,), (3, 1, 7), Cut(0, 1), Repetition(Cut(0, 0), rows=True)),
        ((1, 7), (3, 1, 7), Cut(0, 1), Repetition(Cut(0, 0), rows=True)),
        ((3, 1), (1, 3, 7), Cut(0, 2), Repetition(Cut(0, 1), rows=False)),
        ((3, 1, 1), (3, 1, 7), Cut(0, 1), Repetition(Cut(0, 1), rows=False)),
        ((7, 1), (3, 7, 1), Cut(0, 1), Repetition(Cut(0, 0), rows=True)),
        ((1, 3, 7), (3, 7), Cut(0, 1), None),
        ((7,), (3, 2, 7), Cut(0, 1), None),
    ],
)
def test_a_row_may_have_fewer_dimensions_than_the_columns(
    term: tuple[int, ...], shape: tuple[int, ...], cut: Cut, lies: Repetition | None
) -> None:
    assert repetition(term, shape, cut) == lies


def test_questions_about_sizes_that_only_the_run_knows_do_not_raise() -> None:
    env = ShapeEnv()
    u, v = (sizes.dim_of(env.create_unbacked_symint()) for _ in range(2))
    assert not sizes.is_one(u)
    assert not sizes.is_zero(u)
    assert not sizes.equal(u, v)
    assert sizes.equal(sizes.numel((u, v + 1)), sizes.numel((u, v)) + u)
    assert not sizes.same_shape((u, 4), (v, 4))
    assert not env.guards


def test_a_matrix_of_symbolic_sizes_is_column_major_by_its_strides() -> None:
    env = ShapeEnv()
    node = _node((6, 4), env)
    turned = fx.Graph().placeholder("y")
    turned.meta["val"] = node.meta["val"].t()
    assert not sizes.is_column_major(node)
    assert sizes.is_column_major(turned)
    assert not env.guards


@contextmanager
def guards_of_ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The guards that the pass adds to whatever is compiled inside."""
    found: list[str] = []
    rewrite_graph = joint_pass.rewrite_graph

    def counted(graph: fx.Graph, *args: Any, **kwargs: Any) -> Any:
        value = next(v for n in graph.nodes if (v := sizes.example_of(n)) is not None)
        guards = value.fake_mode.shape_env.guards  # type: ignore[attr-defined]
        before = len(guards)
        report = rewrite_graph(graph, *args, **kwargs)
        found.extend(str(guard.expr) for guard in guards[before:])
        return report

    monkeypatch.setattr(joint_pass, "rewrite_graph", counted)
    yield found


def _lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    return (F.linear(x, w, c) + 2 * F.linear(F.linear(x, a), b)).sin(), c.sin()


def _turned(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    y = (x @ w.t() + x @ a.t() @ b.t()).transpose(0, 1)
    return y.contiguous().sin(), (y * c[:, None]).sum(1)


@pytest.mark.parametrize("fn", [_lora, _turned])
@pytest.mark.parametrize("grad", [False, True])
def test_all_sizes_dynamic(
    fn: Callable[..., tuple[Tensor, ...]], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the border between two plans may become a guard: a range of one size."""
    torch._dynamo.reset()
    shapes = [(24, 8), (10, 8), (2, 8), (10, 2), (10,)]
    given = [torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes]
    compiled = torch.compile(
        fn, backend="runlora_eager", dynamic=True, fullgraph=True, options=STRICT
    )
    with guards_of_ours(monkeypatch) as guards:
        found = compiled(*given)
        for mine, wanted in zip(found, fn(*given), strict=True):
            torch.testing.assert_close(mine, wanted)
    assert not [g for g in guards if not any(sign in g for sign in ("<", ">"))]
    report = runlora_fx.last_report()
    assert report is not None
    assert report.sites
    assert not report.refusals


def test_a_torch_level_graph_keeps_the_number_of_columns_that_only_the_call_knows() -> None:
    """Five rows and a symbolic number of columns were once flattened into a row."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x.sin().reshape(5, -1).t()
        return (x @ w + x @ a @ b).sin()

    def backend(gm: fx.GraphModule, example_inputs: list[Tensor]) -> fx.GraphModule:
        return runlora_fx.rewrite(gm, strict=True)

    torch._dynamo.reset()
    x, w, a, b = (torch.randn(s, dtype=torch.float64) for s in [(1, 5, 30), (5, 8), (5, 2), (2, 8)])
    torch._dynamo.mark_dynamic(x, 2)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x, w, a, b), fn(x, w, a, b))


@pytest.mark.parametrize("grad", [False, True])
def test_numbers_of_tokens_that_only_the_run_knows(grad: bool) -> None:
    """Tokens picked by a mask, in front of a layer with a bias, an adapter and a vector."""

    def fn(x: Tensor, mask: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        y = x[mask]
        return ((F.linear(y, w, c) + 2 * F.linear(F.linear(y, a), b)) * c).sin()

    torch._dynamo.reset()
    shapes = [(400, 64), (64, 64), (4, 64), (64, 4), (64,)]
    x, *weights = (torch.randn(s, dtype=torch.float64, requires_grad=grad) for s in shapes)
    given = [x, torch.arange(400) % 3 > 0, *weights]
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(fn, backend="runlora_eager", fullgraph=True, options=STRICT)
        assert_same_outputs_and_grads(fn, compiled, given, 1e-9)
    report = runlora_fx.last_report()
    assert report is not None
    assert report.flops_after < report.flops_before


def test_a_product_is_not_needed_for_its_sizes() -> None:
    """Symbolic graphs ask the adapter's product for sizes that its operands have."""

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + 2 * F.linear(F.linear(x, a), b)

    def inputs(batch: int) -> list[Tensor]:
        sizes = (batch, 40, 64), (96, 64), (4, 64), (96, 4)
        return [torch.randn(size, dtype=torch.float64) for size in sizes]

    graph = make_fx(layer, tracing_mode="symbolic")(*inputs(2))
    rewritten = runlora_fx.rewrite(graph, strict=True, objective="flops")
    products = [node for node in rewritten.graph.nodes if "mm" in str(node.target)]
    assert len(products) == 2  # the merged weight, and the layer
    other = inputs(5)
    torch.testing.assert_close(rewritten(*other), layer(*other))


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_matrix_that_is_repeated_over_a_batch_is_one_matrix(mode: Any) -> None:
    """A linear layer on an input that is not contiguous is traced so."""

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return F.linear(x, w) + 2 * F.linear(F.linear(x, a), b)

    def inputs(batch: int) -> list[Tensor]:
        sizes = (batch, 40, 64), (96, 64), (4, 64), (96, 4)
        return [torch.randn(size, dtype=torch.float64) for size in sizes]

    given = inputs(2)
    graph = make_fx(layer, tracing_mode=mode)(*given)
    assert any(node.target is torch.ops.aten.bmm.default for node in graph.graph.nodes)
    rewritten = runlora_fx.rewrite(graph, strict=True, objective="flops")
    products = [node for node in rewritten.graph.nodes if "mm" in str(node.target)]
    assert len(products) == 2  # the merged weight, and the layer
    given = given if mode == "real" else inputs(5)
    torch.testing.assert_close(rewritten(*given), layer(*given))
