"""Small graphs that were once rewritten wrongly or not at all; random programs found them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from checks import outputs_and_grads
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.phases import Phases

OPTIONS: Any = {"runlora.strict": True, "runlora.objective": "flops"}

Shapes = list[tuple[int, ...]]


def _given(shapes: Shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [x.requires_grad_() for x in made]


def _same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
        assert not name.startswith("output") or found[name].stride() == value.stride(), name


def _check_functions(fn: Callable[..., Any], shapes: Shapes) -> None:
    """Rewrite a graph of torch functions and compare what it computes."""
    given = _given(shapes)
    gm = fx.symbolic_trace(fn)
    rewritten = runlora_fx.rewrite(gm, given, strict=True, objective="flops")
    _same(outputs_and_grads(rewritten, given), outputs_and_grads(fn, given))


def _check_joint(
    fn: Callable[..., Any], shapes: Shapes, grads: tuple[int, ...] | None = None
) -> None:
    """Compile a function with its backward and compare what it computes.

    Args:
        fn: The function.
        shapes: Of its arguments.
        grads: The arguments that require a gradient; all of them if None.
    """
    torch._dynamo.reset()
    given = [x.requires_grad_(grads is None or i in grads) for i, x in enumerate(_given(shapes))]
    compiled = torch.compile(fn, backend="runlora_eager", fullgraph=True, options=OPTIONS)
    _same(outputs_and_grads(compiled, given), outputs_and_grads(fn, given))


# -- dimensions of size 1 ----------------------------------------------------------------------


def _one_token_with_a_bias(
    x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor, c: Tensor
) -> Tensor:
    return F.linear(x, w, bias) + x @ a @ b @ c


def test_a_bias_is_added_to_one_token_of_each_sequence() -> None:
    """``x[3, 1, 8]`` flattened to ``[3, 8]``: the token may stand with the rows or the columns."""
    shapes = [(3, 1, 8), (7, 8), (7,), (8, 1), (1, 3), (3, 7)]
    _check_functions(_one_token_with_a_bias, shapes)


def _gram_of_one_row(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ x.mT
    return y @ y.transpose(-1, -2), y


def test_a_batch_of_numbers_is_transposed_as_it_is_written() -> None:
    _check_joint(_gram_of_one_row, [(2, 1, 8)])


def _row_seen_as_a_column(
    s: Tensor, x: Tensor, m: Tensor, u: Tensor, v: Tensor, w: Tensor
) -> Tensor:
    row = torch.bmm(torch.bmm(s, x), m)
    return row.view(-1, 1).t() + u @ (v @ w)


def test_a_product_of_one_row_is_added_up_through_its_transpose() -> None:
    """The row is viewed as a column, and the transpose of the column is the row again."""
    given = _given([(1, 1, 4), (1, 4, 5), (1, 5, 6), (1, 9), (9, 9), (9, 6)])
    gm = make_fx(_row_seen_as_a_column)(*given)
    rewritten = runlora_fx.rewrite(gm, strict=True, objective="flops")
    _same({"output": rewritten(*given)}, {"output": _row_seen_as_a_column(*given)})


# -- tensors without elements ------------------------------------------------------------------


def _rank_zero(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return F.linear(x, w) + x @ a @ b @ c


def test_an_empty_gradient_has_its_strides() -> None:
    _check_joint(_rank_zero, [(2, 5, 8), (0, 8), (8, 0), (0, 3), (3, 0)])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_view_of_an_empty_tensor_names_all_its_sizes(rank: int) -> None:
    """Where a size is 0, any other would do for -1."""
    torch._dynamo.reset()
    given = _given([(3, 5, 8), (7, 8), (8, rank), (rank, 7), (7, rank), (rank, 9)])

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        y = F.linear(x, w) + x @ a @ b
        return (y @ c).relu(), y @ c @ d

    compiled: Any = torch.compile(
        fn, backend="runlora_eager", fullgraph=True, dynamic=True, options=OPTIONS
    )
    _same(outputs_and_grads(compiled, given), outputs_and_grads(fn, given))


# -- vectors -----------------------------------------------------------------------------------


def _gram_of_rows(g: Tensor, x: Tensor) -> Tensor:
    y = g[:, None] * x
    return (y @ y.T) * g


def _gram_of_columns(g: Tensor, x: Tensor) -> Tensor:
    y = x.T * g
    return (y.T @ y) * g[:, None]


@pytest.mark.parametrize("fn", [_gram_of_rows, _gram_of_columns])
def test_a_vector_is_added_to_the_diagonal_of_a_product(fn: Callable[..., Any]) -> None:
    """The gradient of ``g``: dot products, and a row or a column that another sum made."""
    _check_joint(fn, [(3,), (3, 8)])


# -- activations whose rows are not flattened ---------------------------------------------------


def _columns_weighed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("bsi,bsi->i", F.linear(x, w) + (x @ a) @ b, t)


def _rows_weighed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    return torch.einsum("bsi,bsi->bs", F.linear(x, w) + (x @ a) @ b, t)


def _low_rank_of_tokens(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    y = (F.linear(x, w) + (x @ a) @ b).reshape(-1, b.shape[1])
    return y.t() @ t.reshape(-1, b.shape[1])


def test_a_product_is_added_to_activations_as_they_are() -> None:
    """One kernel adds and multiplies, and takes matrices only."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, v: Tensor) -> Any:
        base = F.linear(x, w)
        y = F.linear(base + x @ a @ b @ c, v)
        return y.relu(), base

    _check_functions(fn, [(2, 5, 8), (8, 8), (8, 2), (2, 3), (3, 8), (10, 8)])


@pytest.mark.parametrize("fn", [_columns_weighed, _rows_weighed, _low_rank_of_tokens])
@pytest.mark.parametrize("shape", [(1, 5, 8), (2, 6, 8), (4, 16, 8)])
@pytest.mark.parametrize("rank", [1, 3])
def test_activations_are_factors_on_either_side(
    fn: Callable[..., Any], shape: tuple[int, ...], rank: int
) -> None:
    shapes = [shape, (3, 8), (8, rank), (rank, 3), (*shape[:2], 3)]
    _check_functions(fn, shapes)


# -- equal values ------------------------------------------------------------------------------


def _equal_products(x: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    first, second = F.linear(x, w), F.linear(x, w)
    return F.linear(first + 3.0 * second, v)[1:], second


def test_one_of_two_equal_products_is_a_leaf_and_the_other_is_read_through() -> None:
    _check_joint(_equal_products, [(2, 8), (2, 8), (7, 2)])


# -- zero --------------------------------------------------------------------------------------


def _bias_times_zero(x: Tensor, w: Tensor, v: Tensor, b: Tensor, u: Tensor) -> Tensor:
    y = F.linear(x, w)
    return torch.addmm(y, F.linear(y, v, b), u, beta=0)


def test_what_is_multiplied_by_zero_is_no_addend() -> None:
    _check_joint(_bias_times_zero, [(5, 6), (2, 6), (7, 2), (7,), (7, 2)])


def _multiplied_by_a_sum_with_the_identity(
    x: Tensor, w: Tensor, v: Tensor, m: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    gram = y @ y.T
    z = gram + torch.eye(gram.shape[0], dtype=gram.dtype)
    return m @ z + (x @ w + x @ v), gram


def test_a_sum_with_the_identity_is_computed_in_the_region_that_multiplies_by_it() -> None:
    """``M (I + G)`` and ``X (W + V)`` are two regions of one root; the first stays as it came."""
    given = _given([(9, 6), (6, 5), (6, 5), (9, 5), (5, 3)])
    gm = make_fx(_multiplied_by_a_sum_with_the_identity)(*given)
    rewritten = runlora_fx.rewrite(gm, strict=True, objective="flops")
    found, wanted = rewritten(*given), _multiplied_by_a_sum_with_the_identity(*given)
    for one, other in zip(found, wanted, strict=True):
        _same({"output": one}, {"output": other})
    assert len([node for node in rewritten.graph.nodes if "mm" in str(node.target)]) == 3


# -- what the backward reads of the forward ----------------------------------------------------


def _divided_by_a_number(x: Tensor, w: Tensor, b: Tensor, v: Tensor, s: Tensor) -> Any:
    y = F.linear(x, w, b)
    return torch.einsum("bi,oi->bo", y, v) / (2 + s), y


def _sum_divided_by_a_number(x: Tensor, w: Tensor, b: Tensor, v: Tensor, s: Tensor) -> Any:
    y = F.linear(x, w, b)
    return (y @ v.T + (x @ w.T) @ v.T) / (2 + s), y


@pytest.mark.parametrize("fn", [_divided_by_a_number, _sum_divided_by_a_number])
def test_the_backward_scales_a_product_of_the_forward(fn: Callable[..., Any]) -> None:
    """The gradient of ``s`` is made of the product, which the graph keeps for it."""
    _check_joint(fn, [(2, 8), (3, 8), (3,), (6, 3), ()], grads=(4,))


# -- what the forward writes -------------------------------------------------------------------


class RunningMean(nn.Module):
    """A layer whose output is written into a buffer, scaled otherwise than it is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(9, 7, dtype=torch.float64))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        y = F.linear(x, w + w)
        self.mean.mul_(0.9).add_(y.detach())
        return y / 0.5


def test_what_is_written_into_a_buffer_is_computed_in_the_forward() -> None:
    """No output of the forward is made of what is written."""
    torch._dynamo.reset()
    given = _given([(9, 8), (7, 8)])
    model, expected = RunningMean(), RunningMean()
    compiled: Any = torch.compile(model, backend="runlora_eager", fullgraph=True, options=OPTIONS)
    _same(outputs_and_grads(compiled, given), outputs_and_grads(expected, given))
    torch.testing.assert_close(model.mean, expected.mean)
    report = runlora_fx.last_report()
    assert report is not None
    assert not report.refusals


@pytest.mark.parametrize("tag", [None, "must_be_in_forward", "must_be_in_backward"])
def test_a_write_runs_in_the_phase_that_it_is_tagged_for(tag: str | None) -> None:
    graph = fx.Graph()
    x, memory, gradient = map(graph.placeholder, ("primals_1", "primals_2", "tangents_1"))
    doubled = graph.call_function(torch.ops.aten.mul.Tensor, (x, 2))
    written = graph.call_function(torch.ops.aten.copy_.default, (memory, doubled))
    result = graph.call_function(torch.ops.aten.mul.Tensor, (gradient, 2))
    graph.output((x, result))
    if tag is not None:
        written.meta["partitioner_tag"] = tag
    phases = Phases(graph, gradient_nodes(graph), Effects(graph))
    is_backward = tag == "must_be_in_backward"
    assert [phases.runs_backward(n) for n in (doubled, written, result)] == [is_backward] * 2 + [
        True
    ]
