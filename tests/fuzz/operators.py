"""What random programs are made of: operators.

    _linear(b) adds: v3 = F.linear(v1, self.p4, self.p5)

Each function draws operands from a builder and adds its lines; it raises LookupError where nothing
fits. The weight of an operator says how often it is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.fuzz.generate import Builder


@dataclass(frozen=True)
class Draw:
    """One operator.

    Attributes:
        add: Adds it to a program.
        weight: How often it is drawn, compared to others.
    """

    add: Callable[[Builder], Any]
    weight: float = 1.0


_Add = TypeVar("_Add", bound=Callable[..., Any])

OPERATORS: list[Draw] = []


def _operator(weight: float = 1.0) -> Callable[[_Add], _Add]:
    def register(add: _Add) -> _Add:
        OPERATORS.append(Draw(add, weight))
        return add

    return register


def _is_matrix(x: Tensor) -> bool:
    return x.dim() == 2


def _is_stack(x: Tensor) -> bool:
    return x.dim() in (2, 3)


# -- products ---------------------------------------------------------------------------------


@_operator(4)
def _matmul(b: Builder) -> None:
    x = b.pick(_is_stack)
    n, dtype = b.shape(x)[-1], b.values[x].dtype
    fits = [w for w, v in b.values.items() if v.dim() >= 2 and v.shape[-2] == n]
    fits = [w for w in fits if b.values[w].dtype == dtype]
    if fits and b.chance(0.5):
        b.do(f"{x} @ {b.rng.choice(fits)}")
    else:
        b.do(f"{x} @ {b.weight(n, b.size(), dtype)}")


@_operator(3)
def _mirrored(b: Builder) -> None:
    x = b.pick(_is_stack)
    n, dtype = b.shape(x)[-1], b.values[x].dtype
    other = b.pick(lambda v: v.dim() >= 2 and v.shape[-1] == n and v.dtype == dtype)
    b.do(f"{x} @ {other}.mT" if b.chance(0.7) else f"{other} @ {x}.transpose(-1, -2)")


@_operator(4)
def _linear(b: Builder) -> str:
    x = b.pick(lambda v: v.dim() in (1, 2, 3))
    out, dtype = b.size(), b.values[x].dtype
    weight = b.weight(out, b.shape(x)[-1], dtype)
    if b.chance(0.4):
        return b.do(f"F.linear({x}, {weight}, {b.like(out, dtype=dtype)})")
    return b.do(f"F.linear({x}, {weight})")


@_operator(2)
def _module(b: Builder) -> str:
    x = b.pick(lambda v: v.dim() in (2, 3) and v.dtype == torch.float64)
    modules = [g for g in b.given if g.layout.startswith(f"nn.Linear({b.shape(x)[-1]},")]
    if modules and b.chance(0.5):
        return b.do(f"{b.rng.choice(modules).name}({x})")
    bias = b.chance(0.5)
    made = f"nn.Linear({b.shape(x)[-1]}, {b.size()}, bias={bias}, dtype=torch.float64)"
    return b.do(f"{b.module(made)}({x})")


@_operator(2)
def _mm(b: Builder) -> None:
    x = b.pick(_is_matrix)
    n, dtype = b.shape(x)[1], b.values[x].dtype
    out = b.size()
    weight = b.weight(n, out, dtype)
    kind = b.rng.choice(("mm", "addmm", "method", "addmm_row"))
    if kind == "mm":
        b.do(f"torch.mm({x}, {weight})")
    elif kind == "method":
        b.do(f"{x}.mm({weight})")
    else:
        bias = b.like(out, dtype=dtype) if kind == "addmm_row" else ""
        bias = bias or b.like(b.shape(x)[0], out, dtype=dtype)
        beta = b.rng.choice(("", ", beta=0.5", ", alpha=2", ", beta=2, alpha=0.5", ", beta=0"))
        b.do(f"torch.addmm({bias}, {x}, {weight}{beta})")


@_operator(2)
def _bmm(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() == 3)
    (n, rows, inner), out = b.shape(x), b.size()
    dtype = b.values[x].dtype
    other = b.like(n, inner, out, dtype=dtype)
    if b.chance(0.3):
        b.do(f"torch.baddbmm({b.like(n, rows, out, dtype=dtype)}, {x}, {other})")
    else:
        b.do(f"torch.bmm({x}, {other})" if b.chance(0.5) else f"{x} @ {other}")


@_operator(2)
def _einsum(b: Builder) -> None:
    x = b.pick(_is_stack)
    n, out, dtype = b.shape(x)[-1], b.size(), b.values[x].dtype
    free = "bs"[: len(b.shape(x)) - 1]
    kind = b.rng.choice(("out", "out", "in", "turned", "same"))
    if kind == "out":
        b.do(f"torch.einsum('{free}i,oi->{free}o', {x}, {b.like(out, n, dtype=dtype)})")
    elif kind == "in":
        b.do(f"torch.einsum('{free}i,io->{free}o', {x}, {b.like(n, out, dtype=dtype)})")
    elif kind == "turned":
        b.do(f"torch.einsum('oi,{free}i->o{free}', {b.like(out, n, dtype=dtype)}, {x})")
    else:
        other = b.like(*b.shape(x), dtype=dtype)
        to = b.rng.choice((free, "i", ""))
        b.do(f"torch.einsum('{free}i,{free}i->{to}', {x}, {other})")


# -- sums and scales --------------------------------------------------------------------------


@_operator(5)
def _add(b: Builder) -> None:
    x = b.pick()
    other = b.like(*b.shape(x), dtype=b.values[x].dtype, new=0.15)
    if b.mixed and b.chance(0.5):
        other = b.pick(lambda v: v.shape == b.values[x].shape)
    c = b.number()
    forms = ("{x} + {o}", "{x} - {o}", "torch.add({x}, {o}, alpha={c})", "{x} + {c} * {o}")
    b.do(b.rng.choice(forms).format(x=x, o=other, c=c))


@_operator(3)
def _broadcast(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 2)
    shape, dtype = b.shape(x), b.values[x].dtype
    kind = b.rng.choice(("row", "row", "row1", "column", "lead", "number"))
    if kind == "number":
        b.do(f"{x} {b.rng.choice('+-')} {b.number()}")
        return
    lead = (1,) * (len(shape) - 1)
    wanted = {
        "row": shape[-1:],
        "row1": (*lead, shape[-1]),
        "column": (*shape[:-1], 1),
        "lead": shape[1:],
    }[kind]
    other = b.like(*wanted, dtype=dtype)
    b.do(b.rng.choice(("{x} + {o}", "{x} - {o}", "{o} + {x}", "{x} * {o}")).format(x=x, o=other))


@_operator(3)
def _scale(b: Builder) -> None:
    x = b.pick()
    forms = ["{x} * {c}", "{c} * {x}", "{x} / {c}", "-{x}", "torch.mul({x}, {c})", "{x}.div({c})"]
    b.do(b.rng.choice(forms).format(x=x, c=b.number()))


@_operator(2)
def _scale_by_tensor(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1)
    by = b.like(*b.rng.choice(((), (), (1,), (1, 1))), dtype=b.values[x].dtype)
    b.do(b.rng.choice(("{x} * {by}", "{by} * {x}", "{x} / (2 + {by})")).format(x=x, by=by))


@_operator()
def _scale_by_size(b: Builder) -> None:
    x, y = b.pick(lambda v: v.dim() >= 1), b.pick(lambda v: v.dim() >= 1)
    forms = ("{x} * {y}.shape[-1]", "{x} / (1 + {y}.shape[0])", "{x} * ({y}.shape[0] ** -0.5)")
    b.do(b.rng.choice(forms).format(x=x, y=y))


@_operator(4)
def _stretch(b: Builder) -> str:
    x = b.pick(lambda v: v.dim() >= 2)
    shape, dtype = b.shape(x), b.values[x].dtype
    if b.chance(0.6):
        v = b.like(shape[-1], dtype=dtype)
        forms = ["{x} * {v}", "{v} * {x}", "{x} * (1 + {v})", "{x} * ({v} - 1)", "{x} * {v}[None]"]
        if len(shape) == 2 and dtype == torch.float64:
            forms.append("{x} @ torch.diag({v})")
    else:
        v = b.like(*shape[:-1], dtype=dtype)
        forms = ["{x} * {v}.unsqueeze(-1)", "{v}[..., None] * {x}", "{x} * (0.5 * {v}[..., None])"]
        if len(shape) == 2 and dtype == torch.float64:
            forms.append("torch.diag({v}) @ {x}")
    return b.do(b.rng.choice(forms).format(x=x, v=v))


@_operator()
def _times(b: Builder) -> None:
    x = b.pick()
    b.do(f"{x} * {b.like(*b.shape(x), dtype=b.values[x].dtype)}")


@_operator()
def _identity(b: Builder) -> None:
    x = b.pick(_is_matrix)
    n, m = b.shape(x)
    if n == m and b.chance(0.6):
        b.do(f"{x} + torch.eye({x}.shape[0], dtype={x}.dtype)")
    else:
        b.do(f"torch.eye({x}.shape[0], dtype={x}.dtype) @ {x}")


@_operator(2)
def _reduce(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1)
    other = b.like(*b.shape(x), dtype=b.values[x].dtype, new=0.2)
    product = f"({x} * {other})" if b.chance(0.6) else x
    dim = b.rng.choice(("-1", "0", "-1, keepdim=True", ""))
    b.do(f"{product}.{b.rng.choice(('sum', 'sum', 'mean'))}({dim})")


# -- what is not linear -----------------------------------------------------------------------


@_operator(3)
def _pointwise(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1)
    forms = (
        *("F.gelu({x})", "torch.relu({x})", "torch.tanh({x})", "{x}.sigmoid()", "F.silu({x})"),
        *("torch.softmax({x}, -1)", "F.layer_norm({x}, {x}.shape[-1:])", "{x}.sin()"),
        "{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-2)",
    )
    b.do(b.rng.choice(forms).format(x=x))


@_operator(1.5)
def _dropout(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1)
    forms = (
        *("F.dropout({x}, 0.3, True)", "F.dropout({x}, p=0.5)", "{x} + torch.rand_like({x})"),
        *(
            "F.dropout({x}, 0.5, training=False)",
            "F.dropout({x}, 0.0)",
            "torch.dropout({x}, 0.4, True)",
        ),
        "{x} * torch.bernoulli(torch.full_like({x}, 0.5))",
    )
    if b.chance(0.2):
        name = b.module(b.rng.choice(("nn.Dropout(0.3)", "nn.Dropout(0.0)", "nn.Identity()")))
        b.do(f"{name}({x})")
        return
    form = b.rng.choice(forms)
    b.do(form.format(x=x))
    if b.chance(0.3):
        b.do(form.format(x=x))


@_operator(1.5)
def _attention(b: Builder) -> None:
    q = b.pick(lambda v: v.dim() == 3)
    shape, dtype = b.shape(q), b.values[q].dtype
    k, v = (b.like(*shape, dtype=dtype, new=0.2) for _ in range(2))
    forms = (
        "F.scaled_dot_product_attention({q}, {k}, {v})",
        "F.scaled_dot_product_attention({q}.unsqueeze(1), {k}.unsqueeze(1), {v}.unsqueeze(1))",
        "F.scaled_dot_product_attention({q}[:, None], {k}[:, None], {v}[:, None], is_causal=True)",
    )
    b.do(b.rng.choice(forms).format(q=q, k=k, v=v))


# -- shapes and dtypes ------------------------------------------------------------------------


@_operator(4)
def _view(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1)
    n = len(b.shape(x))
    anywhere = ("{x}.unsqueeze(0)", "{x}.contiguous()", "{x}.clone()", "{x}.detach()", "{x}[1:]")
    by_rank = {
        1: ("{x}[None, :]", "{x}.unsqueeze(-1)"),
        2: ("{x}.t()", "{x}.T", "{x}.mT", "{x}.permute(1, 0)", "{x}.view(-1)", "{x}[:, 1:]"),
        3: (
            *("{x}.reshape(-1, {x}.shape[-1])", "{x}.view({x}.shape[0] * {x}.shape[1], -1)"),
            *("{x}.transpose(1, 2)", "{x}.permute(1, 0, 2)", "{x}.flatten(0, 1)", "{x}.mT"),
            *("{x}[0]", "{x}[:, 0]", "{x}.flatten(1)", "{x}.squeeze(0)"),
        ),
    }
    forms = by_rank.get(n, ("{x}.squeeze(0)", "{x}.flatten(0, 1)", "{x}.flatten(0, -2)"))
    b.do(b.rng.choice(anywhere if b.chance(0.25) else forms).format(x=x))


@_operator(1.5)
def _unflatten(b: Builder) -> None:
    y = b.pick(lambda v: v.dim() == 3)
    rows = b.shape(y)[0] * b.shape(y)[1]
    x = b.pick(lambda v: v.dim() == 2 and v.shape[0] == rows)
    forms = (
        "{x}.view({y}.shape[0], {y}.shape[1], -1)",
        "{x}.reshape({y}.shape[0], {y}.shape[1], {x}.shape[-1])",
        "{x}.unflatten(0, ({y}.shape[0], {y}.shape[1]))",
    )
    b.do(b.rng.choice(forms).format(x=x, y=y))


@_operator()
def _expand(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() in (1, 2))
    y = b.pick(lambda v: v.dim() >= 2)
    forms = ("{x}.expand({y}.shape[0], *{x}.shape)", "{x}.expand_as({x})", "{x}.expand({y}.shape)")
    b.do(b.rng.choice(forms).format(x=x, y=y))


@_operator()
def _join(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() in (2, 3))
    other = b.like(*b.shape(x), dtype=b.values[x].dtype, new=0.2)
    b.do(
        b.rng.choice(("torch.cat([{x}, {o}], -1)", "torch.stack([{x}, {o}])[0]")).format(
            x=x, o=other
        )
    )


@_operator(2)
def _cast(b: Builder) -> None:
    if not b.mixed:
        raise LookupError
    x = b.pick()
    forms = (
        *("{x}.to(torch.bfloat16)", "{x}.to(torch.float32)", "{x}.float()", "{x}.double()"),
        *("{x}.to(dtype=torch.bfloat16)", "{x}.to(torch.float64)", "{x}.bfloat16().float()"),
        *("{x}.half().double()", "{x}.to({y}.dtype)", "{x}.type_as({y})"),
    )
    b.do(b.rng.choice(forms).format(x=x, y=b.pick()))


# -- effects ----------------------------------------------------------------------------------


@_operator(1.5)
def _mutate(b: Builder) -> None:
    x = b.pick(made=b.chance(0.7))
    other = b.like(*b.shape(x), dtype=b.values[x].dtype, new=0.2)
    forms = (
        *("{x}.add_({o})", "{x}.mul_(0.5)", "{x}.copy_({o})", "{x}.sub_({o}, alpha=2)"),
        *("F.relu({x}, inplace=True)", "{x}.add_(1)", "{x}.view(-1)[:1].zero_()", "{x}.sin_()"),
        *("F.dropout({x}, 0.3, True, True)", "{x}.t().mul_(2)", "{x}[0].add_(1)"),
    )
    b.effect(b.rng.choice(forms).format(x=x, o=other))


@_operator(0.7)
def _buffer(b: Builder) -> None:
    x = b.pick(lambda v: v.dim() >= 1 and v.dtype == torch.float64)
    state = b.add_given([b.name_of(n) for n in b.shape(x)], "buffer", layout="plain")
    if b.chance(0.5):
        b.do(f"{x} + {state}")
    b.effect(f"{state}.mul_(0.9).add_({x}.detach())")
