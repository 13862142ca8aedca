"""Effects: random operators, mutation, aliasing and modes, each compared with the graph as it came.

Every function here computes a low-rank update that the pass would like to rewrite, next to a node
that must not be moved, merged or read at another place.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.passes.read.effects import Effects

Fn = Callable[..., Any]

SHAPES = {"x": (96, 32), "w": (32, 32), "a": (32, 4), "b": (4, 32), "t": (32,), "v": (32, 32)}
LEVELS = ("dynamo", "make_fx", "runlora_eager")


def inputs() -> list[Tensor]:
    """One tensor for each of the six arguments that the functions take."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in SHAPES.values()]


def rewritten(fn: Fn, level: str) -> Fn:
    """The function, traced at a level and rewritten under strict."""
    torch._dynamo.reset()
    if level == "runlora_eager":
        options: Any = {"runlora.strict": True}
        return torch.compile(fn, backend="runlora_eager", fullgraph=True, options=options)
    if level == "dynamo":

        def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Fn:
            return runlora_fx.rewrite(gm, strict=True)

        return torch.compile(fn, backend=backend, fullgraph=True)
    if level == "symbolic_trace":
        return runlora_fx.rewrite(fx.symbolic_trace(fn), inputs(), strict=True)
    gm = make_fx(fn)(*inputs())
    return runlora_fx.rewrite(gm, inputs(), strict=True)


def assert_same(fn: Fn, level: str) -> None:
    """The rewritten function returns the same and leaves its inputs in the same state."""
    new = rewritten(fn, level)
    ours, wanted = inputs(), inputs()
    torch.manual_seed(0)
    found = new(*ours)
    torch.manual_seed(0)
    expected = fn(*wanted)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours, wanted)


def _changes() -> int:
    report = runlora_fx.last_report()
    assert report is not None
    return sum(site.changed for site in report.sites)


# --- random operators


def _dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, True)


RANDOM: dict[str, Callable[[Tensor], Tensor]] = {
    "F.dropout": _dropout,
    "torch.dropout": lambda x: torch.dropout(x, 0.5, True),
    "feature_dropout": lambda x: torch.feature_dropout(x, 0.5, True),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "bernoulli": lambda x: torch.bernoulli(torch.sigmoid(x)),
    "x.bernoulli": lambda x: torch.sigmoid(x).bernoulli(),
    "rand_like": lambda x: torch.rand_like(x),
    "clone.normal_": lambda x: x.clone().normal_(),
    "multinomial": lambda x: x.gather(1, torch.multinomial(x.abs(), 32)),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "sdpa": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5)[0],
}


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("level", ["symbolic_trace", "dynamo", "make_fx"])
def test_two_draws_stay_two(name: str, level: str) -> None:
    draw = RANDOM[name]

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return draw(x) @ w + draw(x) @ a @ b

    assert_same(fn, level)


@pytest.mark.parametrize(
    "drop",
    [
        lambda x: F.dropout(x, 0.5, False),
        lambda x: F.dropout(x, 0.0),
        lambda x: F.dropout(x, training=False),
        lambda x: torch.dropout(x, 0.5, False),
    ],
)
@pytest.mark.parametrize("level", ["symbolic_trace", "dynamo"])
def test_dropout_that_drops_nothing_is_read_through(
    drop: Callable[[Tensor], Tensor], level: str
) -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, t: Tensor, v: Tensor) -> Tensor:
        return drop(x) @ w + drop(x) @ a @ b

    assert_same(fn, level)
    assert _changes() == 1


# --- mutation


def _scaled_before_the_vector_changes(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    p = y * t
    t.add_(1)
    return p.sum(1), y


def _multiplied_before_the_factor_changes(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    t = x + 0
    p = y * t
    t.add_(1)
    return p.sum(1), y


def _input_changed_between(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    x.mul_(2)
    return base + x @ a @ b


def _by_out(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    torch.exp(x, out=x)
    return base + x @ a @ b


def _relu_by_position(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    F.relu(x, True)
    return base + x @ a @ b


def _dropout_by_position(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    F.dropout(x, 0.5, True, True)
    return base + x @ a @ b


def _dropout_that_drops_nothing_is_an_alias(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    F.dropout(x, 0.5, False).add_(1)
    return base + x @ a @ b


def _setitem(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    x[:, :8] = 1.0
    return base + x @ a @ b


def _augmented(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    x += 1
    return base + x @ a @ b


def _foreach(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    torch._foreach_add_([t, x], 1.0)
    return base + x @ a @ b


def _view_of_a_view(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    x.view(4, 24, 32)[1].t()[:5].add_(1)
    return base + x @ a @ b


def _reshape_that_may_copy(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    x.reshape(-1).mul_(2)
    return base + x @ a @ b


def _view_taken_before(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    flat = x.view(4, 24, 32)
    base = x @ w
    x.add_(1)
    return base + flat.view(96, 32) @ a @ b


def _second_argument_of_an_unknown_view(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    torch.broadcast_tensors(t, x)[1].add_(1)
    return base + x @ a @ b


def _split_in_two(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    left, right = x.split(16, 1)
    right.copy_(left)
    return base + x @ a @ b


def _weight_changed(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    w.add_(1)
    z = x @ w + x @ a @ b
    return y, z


def _factor_changed_before_the_sum(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    down = x @ a
    up = down @ b
    a.zero_()
    return x @ w + up


def _after_the_last_reader(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    z = torch.tanh(y)
    x.add_(1)
    return z, x


def _under_no_grad(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    with torch.no_grad():
        x.add_(1)
    return base + x @ a @ b


def _result_changed(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    z = x @ w + x @ a @ b
    y.add_(1)
    return y, z


def _result_changed_through_a_view(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    y = x @ w + x @ a @ b
    y.view(-1)[::2].zero_()
    return y, y @ v


def _cast_and_back(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    wide = x.float().to(torch.float64, copy=True)
    wide.add_(1)
    y = wide @ w + wide @ a @ b
    return y, x


def _cast_changed_and_cast_back(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    x, w, a, b = (z.float() for z in (x, w, a, b))
    wide = x.double()
    wide.add_(1)
    back = wide.float()
    return x @ w + back @ a @ b


def _batch_norm_in_between(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    mean, var = t * 0, t * 0 + 1
    y = (x @ w + x @ a @ b) * mean
    h = F.batch_norm(x, mean, var, None, None, True)
    z = (h @ w + h @ a @ b) * mean
    return y.sum(1), z, y


def _embedding_that_renormalises(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    rows = F.embedding(torch.tensor([0, 1]), x, None, 0.5)
    return base + x @ a @ b, rows


def _diagonal_and_its_view(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    g = t[None, :]
    y = (x @ w + x @ a @ b) * g
    t.mul_(2)
    return (y @ v).sum(0), (x @ w + x @ a @ b) * g


def _residual_in_place(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    x += x @ w + x @ a @ b
    x += x @ v + x @ a @ b
    return x


def _the_same_sum_before_and_after(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    first = (2 * x) @ w + (2 * x) @ a @ b
    x.add_(1)
    return first, (2 * x) @ w + (2 * x) @ a @ b


MUTATIONS: tuple[Fn, ...] = (
    _scaled_before_the_vector_changes,
    _multiplied_before_the_factor_changes,
    _input_changed_between,
    _by_out,
    _relu_by_position,
    _dropout_by_position,
    _dropout_that_drops_nothing_is_an_alias,
    _setitem,
    _augmented,
    _foreach,
    _view_of_a_view,
    _reshape_that_may_copy,
    _view_taken_before,
    _second_argument_of_an_unknown_view,
    _split_in_two,
    _weight_changed,
    _factor_changed_before_the_sum,
    _after_the_last_reader,
    _under_no_grad,
    _result_changed,
    _result_changed_through_a_view,
    _cast_and_back,
    _cast_changed_and_cast_back,
    _batch_norm_in_between,
    _embedding_that_renormalises,
    _diagonal_and_its_view,
    _residual_in_place,
    _the_same_sum_before_and_after,
)


@pytest.mark.parametrize("fn", MUTATIONS, ids=lambda fn: fn.__name__.strip("_"))
@pytest.mark.parametrize("level", LEVELS)
def test_mutation(level: str, fn: Fn) -> None:
    if level == "runlora_eager" and fn is _dropout_that_drops_nothing_is_an_alias:
        pytest.skip("AOTAutograd copies there, also under aot_eager")
    assert_same(fn, level)


# --- mutation that costs nothing


def _before_the_first_reader(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    x.relu_()
    return x @ w + x @ a @ b


def _activation_in_place(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    h = F.relu(x @ v, inplace=True)
    return h @ w + h @ a @ b


def _another_tensor(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    base = x @ w
    t.add_(1)
    return base + x @ a @ b, t


def _residual_added_in_place(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
    h = x.clone()
    h += torch.tanh(h @ w + h @ a @ b)
    h += torch.tanh(h @ v + h @ a @ b)
    return h


@pytest.mark.parametrize(
    ("fn", "changes"),
    [
        (_before_the_first_reader, 1),
        (_activation_in_place, 1),
        (_another_tensor, 1),
        (_residual_added_in_place, 1),
        (_after_the_last_reader, 1),
    ],
    ids=lambda x: getattr(x, "__name__", "").strip("_"),
)
@pytest.mark.parametrize("level", LEVELS)
def test_mutation_elsewhere_costs_nothing(level: str, fn: Fn, changes: int) -> None:
    assert_same(fn, level)
    assert _changes() == changes


# --- what a graph shares


class _Tied(nn.Module):
    """One weight under two names, and a buffer that is a view of it."""

    def __init__(self) -> None:
        super().__init__()
        _, w, a, b, _, _ = inputs()
        self.w = self.again = nn.Parameter(w, requires_grad=False)
        self.register_buffer("turned", self.w.detach().t())
        self.a, self.b = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ self.w
        self.turned.mul_(2)
        return y + x @ self.a @ self.b, x @ self.again


def _tied_graph() -> fx.GraphModule:
    """``forward`` of the module above, with every attribute read by its own name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    w, turned, a, b = map(graph.get_attr, ("w", "turned", "a", "b"))
    graph.get_attr("again")
    base = graph.call_function(torch.matmul, (x, w))
    graph.call_method("mul_", (turned, 2))
    down = graph.call_function(torch.matmul, (x, a))
    up = graph.call_function(torch.matmul, (down, b))
    total = graph.call_function(torch.add, (base, up))
    graph.output((total, graph.call_function(torch.matmul, (x, graph.get_attr("again")))))
    return fx.GraphModule(_Tied().requires_grad_(False), graph)


def test_tied_attributes_are_one_memory() -> None:
    x, model = inputs()[0], _Tied().requires_grad_(False)
    new = runlora_fx.rewrite(_tied_graph(), [x], strict=True)
    torch.testing.assert_close(new(x), model(x))
    torch.testing.assert_close(new.turned, model.turned)


@pytest.mark.parametrize("level", ["symbolic_trace", "make_fx"])
def test_looking_at_a_graph_modifies_nothing(level: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32)).double(), inputs()[0]
    gm = fx.symbolic_trace(model) if level == "symbolic_trace" else make_fx(model)(x)
    before = {name: tensor.clone() for name, tensor in gm.state_dict().items()}
    runlora_fx.rewrite(gm, [x], strict=True)
    torch.testing.assert_close(dict(gm.state_dict()), before)


def test_inputs_that_share_a_storage_are_one_memory() -> None:
    def fn(x: Any, w: Any, a: Any, b: Any, turned: Any) -> Any:
        base = x @ w
        turned.add_(1)
        return base + x @ a @ b

    def given() -> list[Tensor]:
        x, w, a, b, *_ = inputs()
        return [x, w, a, b, x.t()]

    new = runlora_fx.rewrite(fx.symbolic_trace(fn), given(), strict=True)
    torch.testing.assert_close(new(*given()), fn(*given()))


def test_attributes_are_told_apart_by_their_storage() -> None:
    graph = _tied_graph().graph
    by_name = {node.target: node for node in graph.nodes if node.op == "get_attr"}
    effects = Effects(graph)
    w, again, turned, a = (by_name[name] for name in ("w", "again", "turned", "a"))
    assert effects.memory_of(w) == effects.memory_of(again) == effects.memory_of(turned)
    assert effects.memory_of(w).isdisjoint(effects.memory_of(a))
    assert effects.attribute(w) != effects.attribute(again)  # it was modified in between


def test_a_write_through_a_view_changes_the_version_of_its_base() -> None:
    def fn(x: Any, w: Any) -> Any:
        product = x @ w
        view = x.view(-1)
        noise = torch.rand_like(x)
        view.add_(1)
        return product + noise, product * 2

    graph = fx.symbolic_trace(fn).graph
    effects, nodes = Effects(graph), {node.name: node for node in graph.nodes}
    product, view, noise, write = (nodes[n] for n in ("matmul", "view", "rand_like", "add_"))
    assert effects.writes(write) == effects.memory_of(nodes["x"]) == effects.memory_of(view)
    assert effects.is_random(noise)
    assert effects.version(nodes["x"], product) == 0
    assert effects.version(nodes["x"], nodes["add"]) == 1


def test_modes_are_counted_from_the_first() -> None:
    graphs: list[fx.GraphModule] = []

    def fn(x: Tensor) -> Tensor:
        y = x + 1
        with torch.no_grad():
            z = x + 2
        with torch.autocast("cpu", torch.bfloat16):
            u = x + 3
        return y + z + u

    torch._dynamo.reset()
    torch.compile(fn, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)(torch.ones(2))
    effects = Effects(graphs[0].graph)
    adds = [node for node in graphs[0].graph.nodes if "add" in str(node.target)]
    y, z, u, *rest = (effects.mode_of(node) for node in adds)
    assert y == 0
    assert len({y, z, u}) == 3
    assert rest == [0, 0]


def test_a_graph_that_an_operator_calls_is_looked_into() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return (x @ w + x @ a @ b).tanh_()

        y = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False)
        return x @ w + y + x @ a @ b

    graphs: list[fx.GraphModule] = []
    given = [z.requires_grad_() for z in inputs()[:4]]
    torch._dynamo.reset()
    torch.compile(fn, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)(*given)
    (call,) = (n for n in graphs[0].graph.nodes if "checkpoint" in str(n.target))
    effects = Effects(graphs[0].graph)
    assert not effects.writes(call)
    assert not effects.is_random(call)
    assert not effects.is_pure(call)


def test_two_results_of_one_value_stay_two_tensors() -> None:
    def fn(x: Any, w: Any, a: Any, b: Any, t: Any, v: Any) -> Any:
        return x @ w + x @ a @ b, x @ w + x @ a @ b

    for level in ("symbolic_trace", *LEVELS):
        one, other = rewritten(fn, level)(*inputs())
        wanted = other.clone()
        one.zero_()
        torch.testing.assert_close(other, wanted)
