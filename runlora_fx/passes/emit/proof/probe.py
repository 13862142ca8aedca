"""Probes: compute the old and the new root from the same random numbers, and compare.

    X W' + s (X A') B'   and   X (W + s B A)'     on random X, W, A, B: equal up to rounding

A probe does not depend on the reader: it runs the calls of the graph, in fp64 on the CPU, with the
sizes of the example tensors. It runs products, elementwise operators and views, from the root
upwards. All other tensors are random: one for each input and for each call that draws random
numbers, and the same one for equal calls of a pure operator. So a probe also detects that two draws
of dropout were merged into one.

Invariant: a probe changes neither the graph nor the state of the random generators. A root that
cannot be run, or that would take too much memory, is not probed, and the log says so.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterable
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import fx

from runlora_fx._torch_compat import outside_all_modes
from runlora_fx.passes.emit.nodes.layout import takes_any_layout
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.levels.assigned import TokenAssignment
from runlora_fx.passes.levels.forms import (
    Broadcast,
    Copy,
    Form,
    MatrixProduct,
    Operand,
    RepeatedRow,
    VirtualOperand,
    WeightedSum,
)
from runlora_fx.passes.levels.operators import RESHAPES, names_of
from runlora_fx.passes.levels.origins import Attribute, Computed, Origin
from runlora_fx.passes.levels.sizes import Shape, dim_of, example_of, shape_of
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.calls import name_of
from runlora_fx.passes.read.known_calls import CASTS

_log = logging.getLogger("runlora_fx")

#: The largest size of all tensors of one probe together [B].
_MAX_BYTES = 1 << 26

#: The largest number of calls that a probe runs above the rewritten nodes. Their inputs are random.
_MAX_NODES = 200

#: The largest difference of the results, relative to the largest number in them.
_TOLERANCE = 1e-8

_VIEWS = names_of(RESHAPES)

#: Calls that return the same tensor every time. The identity matrix is made of them.
_CONSTANTS = ("iota", "arange", "eye", "full", "ones", "zeros", "new_zeros")

_aten = torch.ops.aten

_GROUPED = _aten._grouped_mm.default

#: Merges that keep their result, or that take no fp64.
_MERGES = ("merged_weight", "fused_merge")


def probe(analysis: Analysis, old: fx.Node, new: fx.Node, written: Iterable[fx.Node]) -> bool:
    """Compare an emitted root with the root that it is to replace, on random numbers.

    Args:
        analysis: The graph; both nodes are in it.
        old: The root as it came.
        new: The root as it was emitted.
        written: All nodes that were emitted.

    Returns:
        True if they were compared; False if they cannot be run, or take too much memory.

    Raises:
        VerificationError: If they differ by more than rounding.
    """
    try:
        with outside_all_modes(), torch.no_grad():
            values = _Probe(analysis, old, new, set(written)).values()
            found = None if values is None else _apart(*values)
    except Exception as error:
        _log.info("runlora could not probe %s: %s: %s", old.name, type(error).__name__, error)
        return False
    if found is None:
        _log.info("runlora did not probe %s: it takes more than %d B", old.name, _MAX_BYTES)
        return False
    apart, size = found
    if not apart <= _TOLERANCE * (1.0 + size):
        raise VerificationError(
            f"{old.name}: on random numbers the emitted {new.name} is {apart:.3g} apart, "
            f"of numbers up to {size:.3g}"
        )
    return True


def _apart(was: torch.Tensor, now: torch.Tensor) -> tuple[float, float]:
    """The largest difference of two tensors, and the largest number in the first."""
    finite = was.isfinite()
    if not torch.equal(finite, now.isfinite()):
        return float("inf"), 0.0
    if not bool(finite.any()):
        return 0.0, 0.0
    return float((was - now)[finite].abs().max()), float(was[finite].abs().max())


def _grouped(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """``aten::_grouped_mm`` in fp64: rows times their experts' matrices, or columns times rows."""
    spans = list(pairwise([0, *ends.tolist()]))
    if right.dim() == 3:
        made = left.new_zeros(left.shape[0], right.shape[2])
        for matrix, (begin, end) in zip(right, spans, strict=True):
            made[begin:end] = left[begin:end] @ matrix
        return made
    return torch.stack([left[:, begin:end] @ right[begin:end] for begin, end in spans])


class _Probe:
    """One run of two nodes and of the calls above them."""

    def __init__(
        self, analysis: Analysis, old: fx.Node, new: fx.Node, written: set[fx.Node]
    ) -> None:
        self._analysis = analysis
        self._ends = (old, new)
        self._written = written
        self._generator = torch.Generator().manual_seed(0)
        self._random: dict[Hashable, Any] = {}
        self._keys: dict[fx.Node, Hashable] = {}
        reader = analysis.reader
        origins = (leaf.origin for leaf in reader.leaves.matrices)
        self._virtual = {o.key(reader.values) for o in origins if isinstance(o, Computed)}
        self._assigning = {by.node: by for by in analysis.reader.leaves.assignments}

    def values(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The values of both nodes; None if they take too much memory."""
        run = self._calls_to_run()
        needed = dict.fromkeys(n for node in run for n in (*node.all_input_nodes, node))
        if sum(map(self._bytes, needed)) > _MAX_BYTES:
            return None
        known: dict[fx.Node, Any] = {}
        for node in self._analysis.graph.nodes:
            if node in needed:
                known[node] = self._run(node, known) if node in run else self._given(node)
        old, new = self._ends
        return known[old], known[new]

    def _calls_to_run(self) -> set[fx.Node]:
        """The calls to run: from both nodes up to the tensors that are random."""
        run: set[fx.Node] = set()
        pending, above = list(self._ends), 0
        while pending:
            node = pending.pop(0)
            if node in run or not self._is_run(node):
                continue
            is_read = self._analysis.reader.is_read(node)
            if node not in self._written and not is_read:
                if above == _MAX_NODES or not self._is_simple(node):
                    continue
                above += 1
            is_pair = isinstance(node.meta.get("val"), tuple) and is_read
            if self._is_random(node) or (example_of(node) is None and not is_pair):
                continue
            run.add(node)
            pending.extend(node.all_input_nodes)
        return run

    def _is_run(self, node: fx.Node) -> bool:
        """True if a node is a call that may be run. A virtual leaf is random instead."""
        if node.op == "call_module":
            return node in self._analysis.reader.forms
        is_call = node.op in ("call_function", "call_method")
        return is_call and self._analysis.reader.values.of(node) not in self._virtual

    def _is_simple(self, node: fx.Node) -> bool:
        if name_of(node.target) in _CONSTANTS:
            return True
        return isinstance(node.target, torch._ops.OpOverload) and takes_any_layout(node.target)

    def _is_random(self, node: fx.Node) -> bool:
        if isinstance(node.target, torch._ops.OpOverload):
            target = node.target
            return target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags
        return node not in self._written and not self._analysis.effects.is_pure(node)

    # -- values --------------------------------------------------------------------------------

    def _given(self, node: fx.Node) -> Any:
        """The random value of a node that is not run; a symbol has its size from the trace."""
        key = self._key(node)
        if key not in self._random:
            self._random[key] = self._new(node)
        return self._random[key]

    def _new(self, node: fx.Node) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return self._analysis.hint(dim_of(val))
        if not isinstance(val, torch.Tensor):
            return 1.5 if isinstance(val, torch.SymFloat) else val
        shape = self._shape(node)
        if node in self._assigning:
            return self._experts_of_tokens(self._assigning[node])
        if not val.dtype.is_floating_point:
            return torch.randint(0, 2, shape, generator=self._generator).to(val.dtype)
        number = torch.rand(shape, generator=self._generator, dtype=torch.float64)
        # Numbers stay away from zero, because something may be divided by them. A random draw keeps
        # its range [0, 1), because it may be compared with a probability.
        is_drawn = node.op.startswith("call") and self._is_random(node)
        return number if is_drawn else number + 0.5

    def _experts_of_tokens(self, by: TokenAssignment) -> torch.Tensor:
        """A random expert for each token, or the offsets at which the experts' rows end."""
        tokens, experts = self._analysis.hint(by.tokens), self._analysis.hint(by.experts)
        k = torch.randint(0, experts, (tokens,), generator=self._generator)
        if by.kind == "indexed":
            return k
        return torch.bincount(k, minlength=experts).cumsum(0).int()

    def _key(self, node: fx.Node) -> Hashable:
        """A key that two nodes share exactly if they must hold the same tensor."""
        if node not in self._keys:
            self._keys[node] = self._key_of(node)
        return self._keys[node]

    def _key_of(self, node: fx.Node) -> Hashable:
        if node.op == "get_attr":
            return (node.op, node.target)
        if node.op not in ("call_function", "call_method") or self._is_random(node):
            return node
        number = self._analysis.reader.values.of(node)
        if number in self._virtual:
            return ("virtual", number)
        args = fx.node.map_arg((node.args, node.kwargs), self._number)
        return (node.op, node.target, repr(args))

    def _number(self, node: fx.Node) -> Any:
        """A number that stands for an argument in a key; equal arguments have equal numbers."""
        key = ("number", self._key(node))
        return self._random.setdefault(key, len(self._random))

    def _run(self, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
        """The result of a call on known values, in fp64 on the CPU."""
        form, sources = self._analysis.reader.forms.get(node), node.all_input_nodes
        if form is not None and (form.origins or node.op == "call_module"):
            return self._read_through(form, known)
        if name_of(node.target) in CASTS and self._is_floating(node, sources[0]):
            return known[sources[0]]
        given: Any = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
        args, kwargs = given[0], dict(given[1])
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        if name_of(node.target) in _VIEWS:  # the strides here may be others than in the graph
            made = args[0].reshape(*args[1:])
        elif node.op == "call_method":
            made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        elif name_of(node.target) in _MERGES:
            made = torch.addmm(*args[:3], alpha=args[3])
        elif node.target is _GROUPED:  # the operator does not take fp64
            made = _grouped(*args)
        else:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            return made.double()
        return made

    def _read_through(self, form: Form, known: dict[fx.Node, Any]) -> Any:
        """The result of a node with virtual leaves, by its form: it may not run in fp64."""
        match form:
            case Copy(source) | Broadcast(source):
                return known[source]
            case RepeatedRow(origin, size):
                return self._leaf(origin, (size,))
            case MatrixProduct(Operand(node), VirtualOperand(origin, rows, cols)):
                return known[node] @ self._leaf(origin, (rows, cols)).T
            case WeightedSum(terms):
                return sum(c * self._read_through(term, known) for term, c in terms)
        raise NotImplementedError(f"a probe of {form}")

    def _leaf(self, origin: Origin, shape: Shape) -> torch.Tensor:
        """The random numbers of a virtual leaf; a node that holds the same tensor gets them too."""
        if isinstance(origin, Attribute):
            key: Hashable = ("get_attr", origin.target)
        else:
            key = ("virtual", origin.key(self._analysis.reader.values))
        if key not in self._random:
            sizes = tuple(map(self._analysis.hint, shape))
            numbers = torch.rand(sizes, generator=self._generator, dtype=torch.float64)
            self._random[key] = numbers + 0.5
        found: torch.Tensor = self._random[key]
        return found

    def _is_floating(self, *nodes: fx.Node) -> bool:
        values = [example_of(node) for node in nodes]
        return all(val is not None and val.dtype.is_floating_point for val in values)

    # -- sizes ---------------------------------------------------------------------------------

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(map(self._analysis.hint, shape_of(node)))

    def _bytes(self, node: fx.Node) -> int:
        return 0 if example_of(node) is None else 8 * prod(self._shape(node))
