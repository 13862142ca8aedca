"""Cases for the fused kernels, run by Triton's interpreter in a process of its own.

    TRITON_INTERPRET=1 python -m tests.kernel_cases     ->      JSON: what came of every case

Triton decides whether it interprets when it is imported, so the tests start this process once and
look their cases up in what it prints. References are plain products in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")
KERNELS = ("merge", "gradient_products", "gradient_products, atomic", "two_products")


@dataclass(frozen=True)
class Case:
    """Operands of one call: sizes, how they lie in memory, and dtypes."""

    kernel: str
    dtype: str
    tokens: int = 70
    outputs: int = 150
    inputs: int = 90
    rank: int = 16
    order: str = "rows"
    weight: str = ""

    @property
    def name(self) -> str:
        sizes = f"{self.tokens} x {self.outputs} x {self.inputs}, r {self.rank}"
        weight = f" for {self.weight}" if self.weight else ""
        return f"{self.kernel}: {sizes}, {self.order}, {self.dtype}{weight}"


def _cases() -> list[Case]:
    found = []
    for kernel, dtype in product(KERNELS, DTYPES):
        # Triton treats both halves alike, and the interpreter takes a second for a dozen cases.
        is_all = dtype != "float16"
        ranks = (1, 3, 16, 33, 64, 128, 130) if is_all else (16, 40)
        found += [Case(kernel, dtype, rank=rank) for rank in ranks]
        found += [Case(kernel, dtype, order=order) for order in ("columns", "sliced")]
        sizes = ((1, 17, 33), (128, 128, 64), (515, 70, 33), (3, 300, 130))
        found += [Case(kernel, dtype, *size) for size in (sizes if is_all else sizes[:1])]
    found += [Case("merge", "float32", weight=w, rank=r) for w in DTYPES[1:] for r in (4, 40)]
    found += [Case("merge", w, weight="float32") for w in DTYPES[1:]]
    return found + [Case("two_products, bias", dtype) for dtype in DTYPES]


CASES = {case.name: case for case in _cases()}

#: The unit roundoff of a dtype, doubled: the interpreter truncates what is stored in bfloat16.
_ROUNDING = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def _operand(case: Case, rows: int, cols: int, seed: int, dtype: str = "") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, cols, generator=generator).to(getattr(torch, dtype or case.dtype))
    if case.order == "columns":
        return made.T.contiguous().T
    if case.order == "sliced":
        wide = torch.full((2 * rows, 3 * cols), torch.nan, dtype=made.dtype)
        wide[::2, 1::3] = made
        return wide[::2, 1::3]
    return made


def _error(case: Case, got: Tensor, dtype: str, *terms: tuple[float, Tensor, Tensor]) -> float:
    """The largest error, as a multiple of what rounding may do to it; terms are s a b."""
    wanted = sum(s * (a.double() @ b.double()) for s, a, b in terms)
    size = sum(abs(s) * (a.double().abs() @ b.double().abs()) for s, a, b in terms)
    inner = max(a.shape[1] for _, a, _ in terms)
    assert isinstance(wanted, Tensor)
    bound = _ROUNDING[dtype] * wanted.abs() + 2.0**-23 * (inner + 8) * size + 1e-30
    if dtype == "float16":
        bound = bound + 2.0**-24  # below the normal numbers
    assert got.dtype == getattr(torch, dtype)
    assert got.is_contiguous()
    return float(((got.double() - wanted).abs() / bound).max())


def _run(case: Case) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[..., list[float]]]:
    """What calls the kernel, and what says how far off its results are."""
    from runlora_fx import kernels

    t, o, i, r = case.tokens, case.outputs, case.inputs, case.rank
    b = _operand(case, o, r, 1)
    if case.kernel == "merge":
        w, a = _operand(case, o, i, 2, case.weight), _operand(case, r, i, 3)
        one = torch.eye(i)
        return (
            lambda: (kernels.merge(w, b, a, 0.5),),
            lambda m: [_error(case, m, case.weight or case.dtype, (1.0, w, one), (0.5, b, a))],
        )
    s = _operand(case, t, r, 4)
    if case.kernel.startswith("gradient_products"):
        dy = _operand(case, t, o, 5)
        return (
            lambda: kernels.gradient_products(dy, b, s, not case.kernel.endswith("atomic")),
            lambda z, g: [
                _error(case, z, case.dtype, (1.0, dy, b)),
                _error(case, g, case.dtype, (1.0, dy.T, s)),
            ],
        )
    x, w = _operand(case, t, i, 6), _operand(case, o, i, 7)
    bias = _operand(case, 1, o, 8)[0] if case.kernel.endswith("bias") else None
    added = [] if bias is None else [(1.0, torch.ones(t, 1), bias[None])]
    return (
        lambda: (kernels.two_products(x, w, s, b, bias),),
        lambda y: [_error(case, y, case.dtype, (1.0, x, w.T), (1.0, s, b.T), *added)],
    )


def main() -> None:
    """Run all cases, and print what came of them."""
    from runlora_fx.kernels import operands

    found: dict[str, object] = {"interpreted": operands.runs_triton(torch.ones(1))}
    for name, case in CASES.items():
        run, errors = _run(case)
        first, again = run(), run()
        is_same = all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
        found[name] = {"errors": errors(*first), "is_same": is_same}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
