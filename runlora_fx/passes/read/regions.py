"""Regions: the polynomials of a graph, grouped into problems that can be planned apart.

A root is a sum of parts between which nothing can be shared. Two parts, of the same root or of
others, belong to one problem if some value other than a leaf could serve both; a value shows two
leaves next to each other, so parts with no such pair in common are independent and their costs add
up.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from torch import fx

from runlora_fx.passes.algebra.addends import Addends, total
from runlora_fx.passes.algebra.assignments import Assignment, Picked
from runlora_fx.passes.algebra.factorise import components
from runlora_fx.passes.algebra.plan import with_unpacking
from runlora_fx.passes.algebra.polynomials import (
    Polynomial,
    Scalar,
    normalise,
    of_factors,
    substitute,
    without_scalar,
)
from runlora_fx.passes.algebra.posed import Dim, PosedProblem
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import GroupedOuter, Keep, Product, Scatter, Step, Sum
from runlora_fx.passes.levels.forms.assigned import AssignedForm
from runlora_fx.passes.levels.origins import Computed
from runlora_fx.passes.levels.sizes import example_of, is_column_major
from runlora_fx.passes.read.dimensions import DimClasses
from runlora_fx.passes.read.made import Made
from runlora_fx.passes.read.pairs import pairs
from runlora_fx.passes.read.phases import Phases, recomputed
from runlora_fx.passes.read.reader import GraphReader


@dataclass(frozen=True)
class Root:
    """A tensor that must exist in the end.

    Attributes:
        node: The node that holds it.
        polynomial: What it is, in leaves of the graph.
        parts: The independent parts of the sum that it is.
        backward: The phase it is computed in.
    """

    node: fx.Node
    polynomial: Polynomial
    parts: tuple[Polynomial, ...]
    backward: bool


@dataclass
class Region:
    """The parts of roots that are planned together, and what the graph computes for them."""

    demands: list[tuple[Root, Polynomial]] = field(default_factory=list)
    incoming: list[Made] = field(default_factory=list)


class Regions:
    """All roots of a graph and the regions they fall into.

    Attributes:
        roots: In graph order.
        regions: What is planned together.
    """

    def __init__(self, reader: GraphReader, phases: Phases, hint: Callable[[Dim], int]) -> None:
        """Group the roots of a graph.

        Args:
            reader: The linear algebra of the graph.
            phases: What of it is forward, what backward.
            hint: The size that a symbolic dimension had when the graph was traced.
        """
        self._reader = reader
        self._phases = phases
        self._hint = hint
        self._kept: set[Polynomial] = set()
        self._keepable: set[Polynomial] = set()
        self._read_backward: set[int] = set()
        self._dots: dict[Polynomial, Made] = {}
        self._above: dict[Hashable, Hashable] = {}
        self.roots = [self._root(node) for node in reader.roots]
        self.regions = self._grouped(list(self._incoming()))

    # -- roots ---------------------------------------------------------------------------------

    def _root(self, node: fx.Node) -> Root:
        p = self._reader.expression(node)
        return Root(node, p, tuple(components(p)), self._phases.runs_backward(node))

    def is_trivial(self, part: Polynomial) -> bool:
        """Whether a part needs no computation of its own: a leaf, or a bias to broadcast."""
        if len(part) != 1:
            return False
        leaves = self._reader.leaves.matrices
        return sum(not leaves[f.leaf].is_ones for f in part.terms[0][0].factors) <= 1

    # -- the graph as it came ------------------------------------------------------------------

    def _incoming(self) -> Iterator[Made]:
        """All that the graph computes, in order; fills `_kept`, `_keepable`, `_read_backward`."""
        forward: dict[Polynomial, Made] = {}
        for node in self._reader.cuts:
            for made in self._made_at(node):
                core = normalise(made.polynomial).core
                yield made
                if made.diag_part:
                    self._dots[core] = made
                if made.backward:
                    self._read_backward |= {p.leaf.leaf for p in made.operands if p.leaf}
                    yield from self._fetched(made, forward)
                    self._may_keep(made)
                    self._may_keep_low(made, forward)
                else:
                    forward.setdefault(core, made)

    def _made_at(self, node: fx.Node) -> Iterator[Made]:
        backward = self._phases.runs_backward(node)
        form = self._reader.forms[node]
        for operands in self._reader.factors_at(node):
            for operand in operands:
                if len(operand) > 1:
                    yield Made.sum_of(operand, backward and self._in_backward(operand), node)
            if isinstance(form, AssignedForm):
                step, made = form.step(self._reader)
            else:
                left, right = map(total, operands)
                step, made = Product(left, right), self._reader.multiplied(left, right)
                made = made.diag_part if form.makes_vector else made
            if all(any(word.factors for word in p.words) for p in step.operands):
                yield Made(step, made, backward, node)  # multiplying by the identity is no step
        if node in self._reader.stops:
            addends = self._reader.addends(node)
            for part in self._root(node).parts:
                mine = tuple(p for p in addends if not set(part.words).isdisjoint(p.words))
                if len(mine) > 1:
                    yield Made.sum_of(mine, backward, node)

    def _in_backward(self, addends: Addends) -> bool:
        """Whether a sum is of the backward: the forward may have added it up already."""
        leaves = total(addends).leaves
        nodes = (node for i in leaves for node in self._reader.leaves.matrices[i].sources)
        return any(node in self._phases.gradients for node in nodes)

    def _fetched(self, made: Made, forward: dict[Polynomial, Made]) -> Iterator[Made]:
        """How the backward gets what the forward made: kept, or made again by checkpointing."""
        for operand in made.operands:
            core = normalise(operand).core
            below = forward.get(core)
            if below is None:
                continue
            if recomputed(below.node):
                yield replace(below, backward=True)
                yield from self._fetched(below, forward)
            else:
                self._kept.add(core)

    def _may_keep(self, made: Made) -> None:
        """Let the backward keep a sum in the stead of the addends that it keeps for it.

        Also one that it would add up if it took the diagonal parts with a common factor at
        once: for ``diag_part(L P) + diag_part(L Q)`` the sum ``P + Q``.
        """
        if not isinstance(made.step, Sum):
            return
        addends = made.operands
        if made.polynomial.is_diag_part:
            addends = self._behind_common_factor(made.operands)
        cores = [normalise(p).core for p in addends]
        if len(cores) > 1 and self._kept.issuperset(cores):
            self._keepable.add(normalise(total(addends)).core)

    def _may_keep_low(self, made: Made, forward: dict[Polynomial, Made]) -> None:
        """Let the backward keep ``X L[k]`` where it makes a gradient of all experts otherwise.

        It is what the gradient of R is made of; a graph that merges ``W + L R`` has none of it.
        """
        if not isinstance(made.step, GroupedOuter | Scatter):
            return
        leaves = self._reader.leaves.matrices
        for below in forward.values():
            if below.polynomial.leaves.isdisjoint(made.polynomial.leaves):
                continue
            for word in below.polynomial.words:
                for pair in pairwise(word.factors) if len(word.factors) > 2 else ():
                    is_picked = [leaves[factor.leaf].picked is not None for factor in pair]
                    if any(is_picked) and not all(is_picked):
                        self._keepable.add(normalise(of_factors(pair)).core)

    def _behind_common_factor(self, sums: Addends) -> Addends:
        """P and Q for ``diag_part(L P)`` and ``diag_part(L Q)``, as the graph computes both."""
        found, lefts = [], set()
        for p in sums:
            made = self._dots.get(normalise(p).core)
            if made is None:
                return ()
            (by, left), right = without_scalar(made.operands[0]), made.operands[1]
            lefts.add(left)
            front = normalise(p).scalar.number / normalise(made.polynomial).scalar.number
            found.append(right.scaled(by).scaled(Scalar(front)))
        return tuple(found) if len(lefts) == 1 else ()

    # -- grouping ------------------------------------------------------------------------------

    def _grouped(self, incoming: list[Made]) -> list[Region]:
        for p in [part for root in self.roots for part in root.parts] + [
            made.polynomial for made in incoming
        ]:
            for first, other in pairwise(self._pairs(p)):
                self._above[self._find(other)] = self._find(first)
        regions: dict[Hashable, Region] = defaultdict(Region)
        for root in self.roots:
            for part in root.parts:
                if not self.is_trivial(part):
                    regions[self._find(self._pairs(part)[0])].demands.append((root, part))
        for made in incoming:
            regions[self._find(self._pairs(made.polynomial)[0])].incoming.append(made)
        return [region for region in regions.values() if region.demands]

    def _pairs(self, p: Polynomial) -> list[Hashable]:
        """What a polynomial must have in common with another to share a value."""
        leaves = self._reader.leaves.matrices
        picked = {i: of.base for i in p.leaves for of in [leaves[i].picked] if of is not None}
        return pairs(p, picked)

    def _find(self, key: Hashable) -> Hashable:
        while (above := self._above.setdefault(key, key)) != key:
            key = above
        return key

    # -- problems ------------------------------------------------------------------------------

    def pose(self, region: Region) -> PosedProblem:
        """A region as a problem."""
        matrices: dict[int, int] = {}
        scalars: dict[int, int] = {}
        assignments: dict[int, int] = {}
        table = self._reader.leaves
        demands = [part for _, part in region.demands]
        for p in demands + [made.polynomial for made in region.incoming]:
            for word in p.words:
                for factor in word.factors:
                    matrices.setdefault(factor.leaf, len(matrices))
                    picked = table.matrices[factor.leaf].picked
                    if picked is not None:
                        matrices.setdefault(picked.base, len(matrices))
                        assignments.setdefault(picked.assignment, len(assignments))
                for scalar in word.scalars:
                    scalars.setdefault(scalar, len(scalars))
                for k in word.scattered:
                    assignments.setdefault(k, len(assignments))

        def own(p: Polynomial) -> Polynomial:
            return substitute(p, matrices, scalars, assignments)

        leaves = [
            replace(leaf, picked=Picked(matrices[leaf.picked.base], assignments[leaf.picked[1]]))
            if leaf.picked is not None
            else leaf
            for leaf in map(table.matrices.__getitem__, matrices)
        ]
        by = [table.assignments[k] for k in assignments]
        dtype = _dtype(region)
        dims = DimClasses(leaves, [own(p) for p in demands], by)
        specs = tuple(self._spec(own_i, i, dims) for own_i, i in enumerate(matrices))

        def value(p: Polynomial, backward: bool) -> Value:
            core = normalise(p).core
            return Value(core, backward or any(specs[i].backward for i in core.leaves))

        def step(made: Made) -> Step:
            return made.step.renamed(own, assignments).making(own(made.polynomial))

        kept = frozenset(
            normalise(own(made.polynomial)).core
            for made in region.incoming
            if normalise(made.polynomial).core in self._kept
        )
        keepable = frozenset(
            normalise(own(core)).core for core in self._keepable if core.leaves <= matrices.keys()
        )
        shown: dict[Polynomial, bool] = {}
        for root, part in region.demands:
            _, transposed, core = normalise(own(part))
            shown.setdefault(core, transposed != is_column_major(root.node))
        problem = Problem(
            leaves=specs,
            dims=tuple(self._hint(size) for size in dims.sizes),
            demands=tuple(
                dict.fromkeys(value(own(part), root.backward) for root, part in region.demands)
            ),
            incoming=(
                *(
                    (value(own(m.polynomial), m.backward), step(m))
                    for m in region.incoming
                    if not m.reads_itself
                ),
                *((Value(core, True), Keep()) for core in _sorted(kept)),
            ),
            kept=kept | keepable,
            itemsize=int(dtype.itemsize),
            dtype=str(dtype).removeprefix("torch."),
            shown=tuple(shown.items()),
            assignments=tuple(
                Assignment(
                    "indexed" if a.kind == "indexed" else "grouped",
                    *dims.of_assignment(k),
                    a.multiple,
                )
                for k, a in enumerate(by)
            ),
        )
        return PosedProblem(
            with_unpacking(problem), dims.sizes, tuple(matrices), tuple(scalars), tuple(assignments)
        )

    def _spec(self, own: int, index: int, dims: DimClasses) -> LeafSpec:
        leaf = dims.leaves[own]
        batch, rows, cols = dims.of(own)
        if leaf.is_ones:
            return LeafSpec(rows, cols, batch, kind="ones")
        backward = any(source in self._phases.gradients for source in leaf.sources)
        if leaf.diagonal:  # a vector: whoever holds it holds next to nothing
            return LeafSpec(rows, cols, batch, "diagonal", backward)
        held = index in self._read_backward or all(
            self._phases.held(self._reader, source) for source in leaf.sources
        )
        fused = leaf.origin.product if isinstance(leaf.origin, Computed) else None
        packed = 0 if fused is None else fused.bits
        return LeafSpec(rows, cols, batch, "matrix", backward, held, leaf.picked, packed)


def _dtype(region: Region) -> torch.dtype:
    val = example_of(region.demands[0][0].node)
    assert val is not None
    return val.dtype


def _sorted(cores: Iterable[Polynomial]) -> list[Polynomial]:
    return sorted(cores, key=lambda core: [word.sort_key() for word in core.words])
