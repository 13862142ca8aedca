"""What is read: one disguise in, one polynomial out, at the torch level and at the ATen level.

Leaves go by their argument names: x (tokens, in), w (out, in), a (rank, in), b (out, rank), bias
(out,), e (another adapter's a and b are a2 and b2). `'` is the transpose.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import runlora_fx
from runlora_fx.passes.algebra.polynomials import Polynomial
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.torch_functions import TORCH
from runlora_fx.passes.read.effects import Effects
from runlora_fx.passes.read.example_values import annotate
from runlora_fx.passes.read.reader import GraphReader

TOKENS, IN, OUT, RANK = 96, 32, 48, 4
SHAPES = {
    "x": (TOKENS, IN),
    "x3": (4, TOKENS // 4, IN),
    "few": (3, IN),
    "w": (OUT, IN),
    "wt": (IN, OUT),
    "a": (RANK, IN),
    "b": (OUT, RANK),
    "a2": (2, IN),
    "b2": (OUT, 2),
    "bias": (OUT,),
    "bias_b": (OUT,),
    "s": (),
    "residual": (TOKENS, OUT),
    "left": (5, 16, 8),
    "right": (5, 8, 24),
    "more": (5, 16, 24),
    "u": (RANK, 3),
    "v": (OUT, 3),
}


def tensors(fn: Callable[..., Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """A random tensor for each argument of a function, by the argument's name."""
    generator = torch.Generator().manual_seed(0)
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    return [torch.randn(SHAPES[name], generator=generator, dtype=dtype) for name in names]


def traced(fn: Callable[..., Tensor], level: str, inputs: list[Tensor]) -> fx.GraphModule:
    """The function as a graph of torch functions or of ATen operators."""
    if level == "torch":
        return fx.symbolic_trace(fn)
    gm = make_fx(fn, tracing_mode="fake")(*inputs)
    names = fn.__code__.co_varnames[: fn.__code__.co_argcount]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for node, name in zip(placeholders, names, strict=True):
        node.name = name
    return gm


def polynomials(gm: fx.GraphModule, level: str, inputs: list[Tensor]) -> list[str]:
    """The polynomial of each root of a graph."""
    annotate(gm, inputs)
    dialect = TORCH if level == "torch" else ATEN
    reader = GraphReader(gm.graph, dialect, Effects(gm.graph))
    return [spelled(reader.expression(root), reader) for root in reader.roots]


def spelled(p: Polynomial, reader: GraphReader) -> str:
    """A polynomial in the names of the nodes that its leaves are."""

    def factor(leaf: int, transposed: bool, diagonal: bool) -> str:
        node = reader.leaves.matrices[leaf].node
        if diagonal:
            assert node is not None
            return f"diag({node.name})"
        return ("1" if node is None else node.name) + ("'" if transposed else "")

    words = []
    for word, c in p.terms:
        leaves = [reader.leaves.scalars[s] for s in word.scalars]
        scalars = [("1/" if leaf.inverse else "") + leaf.node.name for leaf in leaves]
        factors = [factor(*f) for f in word.factors]
        words.append(" ".join(([] if c == 1 else [f"{c:g}"]) + scalars + factors))
    return " + ".join(sorted(words, key=lambda word: (len(word.split()), word)))


def calls(gm: fx.GraphModule) -> list[object]:
    """What a graph calls, in order."""
    return [node.target for node in gm.graph.nodes]


LORA = "x w' + 2 x a' b'"

READS: dict[str, tuple[Callable[..., Tensor], str]] = {
    # how products are written
    "F.linear": (lambda x, w, a, b: F.linear(x, w) + 2 * F.linear(F.linear(x, a), b), LORA),
    "operator @": (lambda x, w, a, b: x @ w.T + (x @ a.T @ b.T) * 2, LORA),
    "matmul": (lambda x, w, a, b: torch.matmul(x, w.t()) + 2 * ((x @ a.t()) @ b.t()), LORA),
    "mm": (lambda x, w, a, b: torch.mm(x, w.t()) + torch.mm(x, torch.mm(a.t(), b.t())) * 2, LORA),
    "addmm with alpha": (
        lambda x, w, a, b: torch.addmm(x @ w.t(), x @ a.t(), b.t(), alpha=2),
        LORA,
    ),
    "addmm with beta": (
        lambda x, w, a, b: torch.addmm(x @ a.t() @ b.t(), x, w.t(), beta=2),
        LORA,
    ),
    "einsum": (
        lambda x3, w, a, b: (
            torch.einsum("bti,oi->bto", x3, w)
            + 2 * torch.einsum("btr,or->bto", torch.einsum("bti,ri->btr", x3, a), b)
        ),
        "x3 w' + 2 x3 a' b'",
    ),
    "einsum, transposed result": (
        lambda x, w: torch.einsum("ni,oi->on", x, w),
        "w x'",
    ),
    "bmm of one": (
        lambda x, wt: torch.bmm(x.unsqueeze(0), wt.unsqueeze(0)).squeeze(0),
        "x wt",
    ),
    "bmm": (lambda left, right: torch.bmm(left, right), "left right"),
    "baddbmm": (
        lambda more, left, right: torch.baddbmm(more, left, right, alpha=3),
        "more + 3 left right",
    ),
    "Conv1D: an untransposed weight": (
        lambda bias, x, wt, a, b: torch.addmm(bias, x, wt) + 2 * (x @ a.t() @ b.t()),
        "1 bias + x wt + 2 x a' b'",
    ),
    # how matrices are turned and folded
    "permute": (lambda x, w: x @ w.permute(1, 0), "x w'"),
    "transpose": (lambda x, w: x @ w.transpose(0, 1), "x w'"),
    "negative dimensions": (lambda x, w: x @ w.transpose(-1, -2), "x w'"),
    "a transposed product": (lambda x, w: (w @ x.t()).t(), "x w'"),
    "three dimensions": (lambda x3, w: x3 @ w.t(), "x3 w'"),
    "flattened by hand": (
        lambda x3, w: (x3.reshape(96, 32) @ w.t()).reshape(4, 24, 48),
        "x3 w'",
    ),
    "unsqueezed": (lambda x, w: (x.unsqueeze(0) @ w.t()).squeeze(0), "x w'"),
    # biases
    "bias": (lambda x, w, bias: F.linear(x, w, bias), "1 bias + x w'"),
    "bias added later": (lambda x, w, bias: x @ w.t() + bias, "1 bias + x w'"),
    "lora_bias": (
        lambda x, w, bias, a, b, bias_b: (
            F.linear(x, w, bias) + 2 * F.linear(F.linear(x, a), b, bias_b)
        ),
        "1 bias + x w' + 2 1 bias_b + 2 x a' b'",
    ),
    # scalings
    "scaled input": (lambda x, w, a, b: x @ w.t() + (2 * x) @ a.t() @ b.t(), LORA),
    "scaled weight": (lambda x, w, a, b: x @ w.t() + x @ (a * 2).t() @ b.t(), LORA),
    "divided": (lambda x, w, a, b: x @ w.t() + (x @ a.t() @ b.t()) / 0.5, LORA),
    "negated and subtracted": (lambda x, w, a, b: x @ w.t() - (-2 * (x @ a.t())) @ b.t(), LORA),
    "added with alpha": (
        lambda x, w, a, b: torch.add(x @ w.t(), x @ a.t() @ b.t(), alpha=2),
        LORA,
    ),
    "tensor-valued scaling": (
        lambda x, w, a, b, s: x @ w.t() + (x @ a.t() @ b.t()) * s,
        "x w' + s x a' b'",
    ),
    "scaling twice": (lambda x, a, b, s: s * (s * (x @ a.t())) @ b.t(), "s s x a' b'"),
    # shapes of the sum
    "two adapters": (
        lambda x, w, a, b, a2, b2: x @ w.t() + 2 * (x @ a.t() @ b.t()) + x @ a2.t() @ b2.t(),
        "x w' + x a2' b2' + 2 x a' b'",
    ),
    "merged weight": (lambda x, w, a, b: x @ (w + 2 * (b @ a)).t(), LORA),
    "residual": (lambda x, w, residual: residual + x @ w.t(), "residual + x w'"),
    "three factors": (lambda x, a, u, v: x @ a.t() @ u @ v.t(), "x a' u v'"),
    "the same word twice": (lambda x, w: x @ w.t() + 3 * (w @ x.t()).t(), "4 x w'"),
    # casts and copies
    "a cast there and back": (
        lambda x, w: x @ w.to(torch.float64).t(),
        "x w'",
    ),
    "dropout that drops nothing": (
        lambda x, w, a, b: x @ w.t() + 2 * (F.dropout(x, 0.5, training=False) @ a.t() @ b.t()),
        LORA,
    ),
}


@pytest.mark.parametrize("level", ("torch", "aten"))
@pytest.mark.parametrize("disguise", READS)
def test_disguise(disguise: str, level: str) -> None:
    fn, expected = READS[disguise]
    inputs = tensors(fn)
    found = polynomials(traced(fn, level, inputs), level, inputs)
    assert found == [expected]


@pytest.mark.parametrize("level", ("torch", "aten"))
@pytest.mark.parametrize("rest", (lambda y, xw: y - xw, lambda y, xw: (y - xw) + y * 0))
def test_a_sum_in_which_words_cancel_is_not_read(
    rest: Callable[[Tensor, Tensor], Tensor], level: str
) -> None:
    """Whoever subtracts what it added relies on rounding."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return rest(x @ w.t() + 2 * (x @ a.t() @ b.t()), x @ w.t())

    inputs = tensors(fn)
    found = polynomials(traced(fn, level, inputs), level, inputs)
    assert sorted(found) == ["x w'", LORA]


@pytest.mark.parametrize("level", ("torch", "aten"))
@pytest.mark.parametrize("disguise", READS)
def test_rewritten_disguise_computes_the_same(disguise: str, level: str) -> None:
    fn, _ = READS[disguise]
    inputs = tensors(fn)
    rewritten = runlora_fx.rewrite(traced(fn, level, inputs), inputs, strict=True)
    torch.testing.assert_close(rewritten(*inputs), fn(*inputs), rtol=1e-11, atol=1e-11)


def test_multiplying_by_the_identity_is_nothing() -> None:
    """PEFT's DoRA pushes an identity matrix through lora_A and lora_B."""

    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.eye(IN, dtype=torch.float64) @ a.t() @ b.t()

    inputs = tensors(fn)
    assert polynomials(traced(fn, "aten", inputs), "aten", inputs) == ["a' b'"]


def test_cast_round_trip_through_a_wider_dtype_is_the_identity() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        again = x.to(torch.float32).reshape(TOKENS, IN).to(torch.bfloat16)
        return x @ w.t() + 2 * (again @ a.t() @ b.t())

    inputs = tensors(fn, torch.bfloat16)
    for level in ("torch", "aten"):
        assert polynomials(traced(fn, level, inputs), level, inputs) == [LORA]


def test_equal_casts_of_one_value_are_one_leaf() -> None:
    """Under autocast every use of an activation has a cast of its own."""

    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x.bfloat16() @ w.t() + (x.bfloat16() @ a.t()) @ b.t()

    inputs = [t.bfloat16() for t in tensors(fn)]
    inputs[0] = inputs[0].float()
    for level in ("torch", "aten"):
        (found,) = polynomials(traced(fn, level, inputs), level, inputs)
        base, adapter = found.split(" + ")
        assert base.split()[0] == adapter.split()[0]


BORDERS: dict[str, tuple[Callable[..., Tensor], list[str]]] = {
    "non-linearity": (lambda x, a, b: torch.tanh(x @ a.t()) @ b.t(), ["x a'", "tanh b'"]),
    "narrowing cast": (
        lambda x, w: (x @ w.t()).to(torch.bfloat16).to(torch.float64),
        ["x w'"],
    ),
    "a root is a leaf to its readers": (
        lambda x, a, b: (h := x @ a.t()) @ b.t() + torch.tanh(h).sum(),
        ["x a'", "matmul b'"],
    ),
    "another tensor's elementwise product": (
        lambda x, w, residual: (x @ w.t()) * residual,
        ["x w'"],
    ),
    "a view that splits the features": (
        lambda x, w: (x @ w.t()).view(TOKENS, 4, 12).transpose(0, 1),
        ["x w'"],
    ),
}


@pytest.mark.parametrize("border", BORDERS)
def test_border(border: str) -> None:
    fn, expected = BORDERS[border]
    inputs = tensors(fn)
    found = polynomials(traced(fn, "torch", inputs), "torch", inputs)
    assert found == expected


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w, a, b: x @ w.t() + x.add_(1) @ a.t() @ b.t(),
        lambda x, w, a, b: x @ w.t() + F.relu(x, inplace=True) @ a.t() @ b.t(),
        lambda x, w, a, b: torch.exp(x, out=x) @ w.t() + x @ a.t() @ b.t(),
    ],
    ids=["x.add_", "relu(inplace=True)", "out="],
)
def test_tensors_modified_in_place_are_not_read(fn: Callable[..., Tensor]) -> None:
    inputs = tensors(fn)
    gm = traced(fn, "torch", inputs)
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    assert not any(site.changed for site in report.sites)
    copies = [[t.clone() for t in inputs] for _ in range(2)]
    torch.testing.assert_close(rewritten(*copies[0]), fn(*copies[1]))


def _twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    before = x @ w.t() + x @ a.t() @ b.t()
    x.add_(1)
    return torch.stack([before, x @ w.t() + x @ a.t() @ b.t()])


def _scaled_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    before = 2 * x
    x.add_(1)
    after = 2 * x
    return torch.stack([y @ w.t() + y @ a.t() @ b.t() for y in (before, after)])


@pytest.mark.parametrize("fn", [_twice, _scaled_twice])
def test_calls_around_a_modification_in_place_are_not_equal(fn: Callable[..., Tensor]) -> None:
    inputs = tensors(fn)
    rewritten = runlora_fx.rewrite(traced(fn, "torch", inputs), inputs, strict=True)
    copies = [[t.clone() for t in inputs] for _ in range(2)]
    torch.testing.assert_close(rewritten(*copies[0]), fn(*copies[1]))


def _base_without_grad(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        base = x @ w.t()
    return base + x @ a.t() @ b.t()


def _base_detached(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x.detach() @ w.t() + x @ a.t() @ b.t()


def _product_without_grad_and_again(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    with torch.no_grad():
        down = torch.tanh(x @ a.t())
    return down @ b.t() + x @ w.t() + x @ a.t() @ b.t()


def _sum_under_autocast(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x, w, a, b = (t.float() for t in (x, w, a, b))
    base, update = x @ w.t(), x @ a.t() @ b.t()
    with torch.autocast("cpu", torch.bfloat16):
        return base + update


@pytest.mark.parametrize(
    "fn",
    [_base_without_grad, _base_detached, _product_without_grad_and_again, _sum_under_autocast],
)
def test_grad_and_autocast_modes_hold_in_rewritten_dynamo_graphs(
    fn: Callable[..., Tensor],
) -> None:
    def gradients(run: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [t.requires_grad_() for t in tensors(fn)]
        out = run(*inputs)
        return [out, *torch.autograd.grad(out.sin().sum(), inputs, allow_unused=True)]

    torch._dynamo.reset()
    compiled = torch.compile(
        fn, backend=lambda gm, _: runlora_fx.rewrite(gm, strict=True), fullgraph=True
    )
    for found, wanted in zip(gradients(compiled), gradients(fn), strict=True):
        torch.testing.assert_close(found, wanted)


PLANS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "many tokens: the weight is merged": (READS["F.linear"][0], "Y = X (W' + 2 A' B')"),
    "a bias stays beside": (READS["Conv1D: an untransposed weight"][0], "Y = X (W + 2 A' B')"),
    "two adapters are merged at once": (
        READS["two adapters"][0],
        "Y = X (W' + 2 A' B' + A2' B2')",
    ),
    "few tokens: two paths": (
        lambda few, w, a, b: few @ w.t() + few @ a.t() @ b.t(),
        "Y = X W' + (X A') B'",
    ),
    "few tokens: a merged weight is split": (
        lambda few, w, a, b: few @ (w + b @ a).t(),
        "Y = X W' + (X A') B'",
    ),
    "a chain goes by its smallest sizes": (
        lambda x, a, u, v: ((x @ a.t()) @ u) @ v.t(),
        "Y = (L1 (L2' L3)) L4'",
    ),
}


@pytest.mark.parametrize("case", PLANS)
def test_plan(case: str) -> None:
    fn, expected = PLANS[case]
    inputs = tensors(fn)
    runlora_fx.rewrite(fx.symbolic_trace(fn), inputs, strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    assert report.sites[0].after == expected


def test_nothing_is_changed_where_nothing_is_saved() -> None:
    def fn(few: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return few @ w.t() + few @ a.t() @ b.t()

    gm = fx.symbolic_trace(fn)
    rewritten = runlora_fx.rewrite(gm, tensors(fn), strict=True)
    assert calls(rewritten) == calls(gm)
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.reason for site in report.sites] == [
        "left alone: the graph as it came is the cheapest"
    ]


@pytest.mark.parametrize("layer", ("conv", "embedding"))
def test_convolutions_and_embeddings_run_as_they_came(layer: str) -> None:
    module = torch.nn.Conv1d(4, 4, 3) if layer == "conv" else torch.nn.Embedding(8, 4)
    x = torch.randn(2, 4, 8) if layer == "conv" else torch.arange(8)
    gm = fx.symbolic_trace(torch.nn.Sequential(module))
    rewritten = runlora_fx.rewrite(gm, (x,), strict=True)
    assert calls(rewritten) == calls(gm)
    torch.testing.assert_close(rewritten(x), module(x))


def test_biases_of_layers_in_a_row_are_added_up_as_rows() -> None:
    """``(X W' + 2 X A' B' + ones b) V + ones c``: the biases sum to one row, ``b V + c``."""

    def fn(
        x: Tensor, w: Tensor, a: Tensor, b: Tensor, bias: Tensor, v: Tensor, c: Tensor
    ) -> Tensor:
        return (F.linear(x, w, bias) + 2 * (x @ a.T @ b.T)) @ v + c

    inputs = [*tensors(lambda x, w, a, b, bias, v: x), torch.ones(3, dtype=torch.float64)]
    gm = make_fx(fn)(*inputs)
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    assert report.flops_after < report.flops_before
    torch.testing.assert_close(rewritten(*inputs), fn(*inputs), rtol=1e-12, atol=1e-12)
