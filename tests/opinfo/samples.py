"""A sample of an operator as a program between low-rank layers, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import runlora_fx

#: The backend that shows whether a failure is torch's own.
PLAIN = {"runlora_eager": "aot_eager", "runlora": "inductor"}

#: By dtype, the relative and the absolute tolerance against eager mode.
TOLERANCES = {
    torch.float64: (1e-7, 1e-9),
    torch.float32: (1e-3, 1e-4),
    torch.bfloat16: (4e-2, 4e-2),
}


RANK = 1


@dataclass(frozen=True)
class Program:
    """A sample as a function of its tensors, between low-rank layers.

    Attributes:
        op: The operator.
        leaves: All leaves of its arguments; tensors are placeholders for the inputs.
        spec: How the leaves make up ``(args, kwargs)``.
        before: The position of the tensor that a low-rank layer feeds, or None.
        after: True if the first output feeds another one.
    """

    op: Any
    leaves: tuple[Any, ...]
    spec: Any
    before: int | None
    after: bool

    def __call__(self, tensors: list[Tensor], layers: list[tuple[Tensor, ...]]) -> Any:
        """The outputs; `layers` are the (W, A, B) before and behind the operator."""
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if self.before is not None:
            leaves[self.before] = low_rank(leaves[self.before], *layers[0])
        args, kwargs = tree_unflatten(leaves, self.spec)
        out = self.op(*args, **kwargs)
        if not self.after:
            return out
        outs, spec = tree_flatten(out)
        outs[0] = low_rank(outs[0], *layers[-1])
        return tree_unflatten(outs, spec)


def low_rank(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x W + (x A) B`` over the last dimension."""
    return x @ w + (x @ a) @ b


def layer_of(x: Tensor) -> tuple[Tensor, ...]:
    """(W, A, B) near the identity, so that `x` stays where the operator is defined."""
    width, kind = x.shape[-1], {"dtype": x.dtype}
    generator = torch.Generator().manual_seed(width)
    a, b = (torch.randn(s, generator=generator) / 32 for s in ((width, RANK), (RANK, width)))
    w = torch.eye(width) + torch.randn(width, width, generator=generator) / 1024
    return w.to(**kind), a.to(**kind).requires_grad_(), b.to(**kind).requires_grad_()


def takes_layer(x: Any) -> bool:
    """Whether a low-rank layer can stand before or behind this value."""
    return (
        isinstance(x, Tensor)
        and x.layout == torch.strided
        and x.is_floating_point()
        and x.dim() > 0
        and x.numel() > 0
        and bool(x.isfinite().all())
    )


class Sample:
    """A sample of an operator, and what its program computes under each backend."""

    def __init__(self, info: Any, sample: Any) -> None:
        leaves, spec = tree_flatten(((sample.input, *sample.args), sample.kwargs))
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.process = sample.output_process_fn_grad
        first = next((i for i, leaf in enumerate(leaves) if takes_layer(leaf)), None)
        self.program = Program(info.get_op(), tuple(leaves), spec, None, False)
        outs = tree_leaves(self._out(self.program, self.tensors, []))
        # An output that only its processing makes unique, such as a singular vector, feeds nothing.
        raw = self.program(self.tensors, [])
        unique = self.process(raw) is raw
        self.layers: list[tuple[Tensor, ...]] = []
        last = outs[0] if unique and outs and takes_layer(outs[0]) else None
        options = [(first, last), (None, last), (None, None)]
        for before, after in options:
            program = Program(info.get_op(), tuple(leaves), spec, before, after is not None)
            layers = [] if before is None else [layer_of(leaves[before])]
            layers += [] if after is None else [layer_of(after)]
            try:
                self._out(program, self.tensors, layers)
            except Exception:  # the layer left the operator's domain
                continue
            self.program, self.layers = program, layers
            return

    def _out(self, run: Any, tensors: list[Tensor], layers: list[tuple[Tensor, ...]]) -> Any:
        torch.manual_seed(0)
        return self.process(run(tensors, layers))

    def values(self, backend: str | None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Outputs and gradients under a backend.

        Args:
            backend: None for eager mode.
            dtype: None for the sample's; otherwise what its floating-point tensors are cast to.
        """

        def fresh(t: Tensor) -> Tensor:
            if t.layout != torch.strided:
                return t.detach().clone().requires_grad_(t.requires_grad)
            copy = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype) if _dense(t) else None
            copy = t.detach().clone() if copy is None else copy.copy_(t.detach())
            if dtype is not None and t.is_floating_point():
                copy = copy.to(dtype)
            return copy.requires_grad_(t.requires_grad)

        tensors = [fresh(t) for t in self.tensors]
        layers = [tuple(map(fresh, layer)) for layer in self.layers]
        run: Any = self.program
        if backend is not None:
            torch._dynamo.reset()
            options: Any = {"runlora.strict": True, "runlora.objective": "flops"}
            run = torch.compile(
                self.program.__call__,
                backend=backend,
                dynamic=False,
                options=options if backend in PLAIN else None,
            )
        outs = [o for o in tree_leaves(self._out(run, tensors, layers)) if isinstance(o, Tensor)]
        wanted = [t for t in (*tensors, *(t for ts in layers for t in ts)) if t.requires_grad]
        roots = [o for o in outs if o.requires_grad]
        grads: list[Tensor] = []
        if wanted and roots:
            found = torch.autograd.grad(
                roots, wanted, [_seed(root) for root in roots], allow_unused=True
            )
            grads = [
                torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)
            ]
        return [value.detach() for value in (*outs, *grads)]


def _dense(t: Tensor) -> bool:
    """Whether a tensor has an element of memory for each of its own."""
    return bool(torch._prims_common.is_non_overlapping_and_dense_or_false(t))


def _seed(root: Tensor) -> Tensor:
    """A gradient for an output: the same for each backend."""
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(root.shape, generator=generator) + 0.5
    return real.to(root.dtype)


def difference(ours: list[Tensor], eager: list[Tensor], dtype: torch.dtype) -> str:
    """What differs, or nothing."""
    if len(ours) != len(eager):
        return f"{len(ours)} values, not {len(eager)}"
    rtol, atol = TOLERANCES[dtype]
    for i, (one, two) in enumerate(zip(ours, eager, strict=True)):
        try:
            torch.testing.assert_close(one, two, rtol=rtol, atol=atol, equal_nan=True)
        except AssertionError as error:
            return f"value {i}: {' '.join(str(error).split())}"
    return ""


def _trial(sample: Sample, backend: str, eager: list[Tensor], dtype: torch.dtype) -> str:
    """How a backend fails on a sample, or nothing."""
    try:
        return difference(sample.values(backend), eager, dtype)
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"


def outcome_of(info: Any, given: Any, backend: str, dtype: torch.dtype) -> tuple[str, str, bool]:
    """What comes of a sample.

    Returns:
        ``"right"``, ``"only rounding"``, ``"not finite"``, ``"eager raises"``, ``"not
        deterministic"``, ``"torch's"`` or ``"ours"``; what differs; whether a region was changed.
    """
    try:
        sample = Sample(info, given)
        eager = sample.values(None)
        if difference(sample.values(None), eager, dtype):
            return "not deterministic", "", False
    except Exception as error:
        return "eager raises", str(error), False
    before = runlora_fx.last_report()
    failure = _trial(sample, backend, eager, dtype)
    report = runlora_fx.last_report()
    changed = report is not before and report is not None and any(s.changed for s in report.sites)
    if not failure:
        return "right", "", changed
    if _trial(sample, PLAIN[backend], eager, dtype):
        return "torch's", failure, changed
    # inf W + (inf A) B may be NaN where inf (W + A B) is not: the operator has to agree alone.
    if not all(bool(value.isfinite().all()) for value in eager):
        sample.program, sample.layers = replace(sample.program, before=None, after=False), []
        eager = sample.values(None)
        failure = _trial(sample, backend, eager, dtype)
        if not failure:
            return "not finite", failure, changed
    # Ill-conditioned samples make much of rounding: in fp64 they agree, and a wrong plan does not.
    try:
        twice = sample.values(None, torch.float64), sample.values(backend, torch.float64)
        if not difference(*twice, torch.float64):
            return "only rounding", failure, changed
    except Exception:
        pass  # no fp64: the failure stands
    return "ours", failure, changed


def samples_of(info: Any, dtype: torch.dtype, most: int) -> Iterator[Any]:
    """The first samples, spread over all that there are; with gradients where there are any."""
    with_grad = info.supports_autograd and dtype in info.supported_backward_dtypes("cpu")
    every = list(info.sample_inputs("cpu", dtype, requires_grad=with_grad))
    step = max(1, len(every) // most)
    yield from every[::step][:most]


def infos() -> dict[str, Any]:
    """The operators of the installed torch that take fp32, by their full names.

    Raises:
        SystemExit: If torch's test helpers cannot be imported.
    """
    try:
        from torch.testing._internal.common_methods_invocations import op_db
    except ModuleNotFoundError as error:
        raise SystemExit(f"torch's samples need the package {error.name!r}: {error}") from error
    # The import forbids to set flags such as torch.backends.mkldnn.enabled in this process.
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return {info.full_name: info for info in op_db if torch.float32 in info.supported_dtypes("cpu")}


def run_op(info: Any, backend: str, most: int) -> Iterator[dict[str, Any]]:
    """The outcomes of an operator's samples, in fp32 and, where it takes it, in bf16."""
    for dtype in (torch.float32, torch.bfloat16):
        if dtype not in info.supported_dtypes("cpu"):
            continue
        for i, given in enumerate(samples_of(info, dtype, most)):
            outcome, text, changed = outcome_of(info, given, backend, dtype)
            yield {
                "op": info.full_name,
                "sample": i,
                "dtype": str(dtype).removeprefix("torch."),
                "outcome": outcome,
                "text": text[:300],
                "changed": changed,
            }
