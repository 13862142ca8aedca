"""Posing: a region becomes a problem with leaf numbers of its own.

Example: the region of ``Y = X W' + 2 X A' B'``, whose leaves are 12, 7, 8 and 9 in the graph, is
the problem of ``0 1' + 2 0 2' 3'`` with four dimensions.

Two regions that differ only in leaf numbers pose one problem object. Everything that a problem
depends on is compared for this: patterns, sizes, phases and layouts.

Invariant: the incoming steps of a problem make its demands from its own leaves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

import torch

from runlora_fx.passes.algebra.assignments import Assignment, Picked
from runlora_fx.passes.algebra.plan import with_unpacking
from runlora_fx.passes.algebra.polynomials import Polynomial, normalise, substitute
from runlora_fx.passes.algebra.posed import Dim, PosedProblem
from runlora_fx.passes.algebra.problem import LeafSpec, Problem, Value
from runlora_fx.passes.algebra.steps import Keep, Product, Step, Sum
from runlora_fx.passes.levels.operators import is_pointwise, readers_of
from runlora_fx.passes.levels.origins import Computed
from runlora_fx.passes.levels.sizes import example_of, is_column_major
from runlora_fx.passes.read.dimensions import DimClasses
from runlora_fx.passes.read.incoming import Incoming
from runlora_fx.passes.read.leaves import Leaf
from runlora_fx.passes.read.made import Made
from runlora_fx.passes.read.patterns import Patterns
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Region

#: :attr:`Problem.scaled`, in leaves of the graph.
_Scaled: TypeAlias = Sequence[tuple[Polynomial, bool]]

#: Factors that cost nothing.
_UNSCALED = (1.0, -1.0)


class _LeafFacts(NamedTuple):
    """What a problem contains about a leaf, apart from the numbers of its dimensions."""

    sizes: tuple[Dim, Dim, Dim]
    batched: bool
    kind: Literal["matrix", "ones", "diagonal"]
    backward: bool
    held: bool
    packed: int
    images: bool
    taps: int


class _Numbers(NamedTuple):
    """Dictionaries from numbers in the graph to numbers in a problem."""

    matrices: dict[int, int]
    scalars: dict[int, int]
    assignments: dict[int, int]


class Poser:
    """Poses the regions of one graph."""

    def __init__(
        self,
        reader: GraphReader,
        phases: Phases,
        incoming: Incoming,
        patterns: Patterns,
        hint: Callable[[Dim], int],
    ) -> None:
        """Prepare to pose regions.

        Args:
            reader: The linear algebra of the graph.
            phases: The phase of its nodes.
            incoming: The steps that the graph takes.
            patterns: The patterns of its polynomials.
            hint: The size that a symbolic dimension had when the graph was traced.
        """
        self._reader = reader
        self._phases = phases
        self._kept = incoming.kept
        self._read_backward = incoming.read_backward
        self._patterns = patterns
        self._hint = hint
        self._leaves: dict[int, _LeafFacts] = {}
        self._posed: dict[Hashable, tuple[Problem, tuple[Dim, ...]]] = {}
        # By its least leaf. A region may save a value if all leaves of the value are in the region.
        self._keepable: dict[int, list[Polynomial]] = defaultdict(list)
        for core in incoming.keepable:
            if core.leaves:
                self._keepable[min(core.leaves)].append(core)

    def pose(self, region: Region) -> PosedProblem:
        """A region as a problem."""
        numbers = self._numbered(region)
        keepable = [
            core
            for leaf in numbers.matrices
            for core in self._keepable.get(leaf, ())
            if core.leaves <= numbers.matrices.keys()
            and core.scalar_leaves <= numbers.scalars.keys()
        ]
        scaled = self._scaled(region)
        key = None if numbers.assignments else self._key(region, numbers, keepable, scaled)
        found = None if key is None else self._posed.get(key)
        if found is None:
            found = self._problem(region, numbers, keepable, scaled)
            if key is not None:
                self._posed[key] = found
        return PosedProblem(*found, *map(tuple, numbers))

    def _numbered(self, region: Region) -> _Numbers:
        """The leaves of a region, numbered in the order of their first place."""
        numbers = matrices, scalars, assignments = _Numbers({}, {}, {})
        leaves = self._reader.leaves.matrices
        polynomials = [part for _, part in region.demands]
        polynomials += [made.polynomial for made in region.incoming]
        for p in polynomials:
            pattern = self._patterns.of(p)
            for leaf in pattern.matrices:
                if leaf in matrices:
                    continue
                matrices[leaf] = len(matrices)
                picked = leaves[leaf].picked
                if picked is not None:
                    matrices.setdefault(picked.base, len(matrices))
                    assignments.setdefault(picked.assignment, len(assignments))
            for scalar in pattern.scalars:
                scalars.setdefault(scalar, len(scalars))
            for k in pattern.assignments:
                assignments.setdefault(k, len(assignments))
        return numbers

    # -- equal regions -------------------------------------------------------------------------

    def _key(
        self, region: Region, numbers: _Numbers, keepable: Iterable[Polynomial], scaled: _Scaled
    ) -> Hashable | None:
        """Everything that the problem of a region depends on; None if a step has no key."""
        matrices, scalars, _ = numbers
        pattern_of = self._patterns.of

        def own(p: Polynomial) -> Hashable:
            return pattern_of(p).renamed(matrices, scalars)

        steps: list[Hashable] = []
        for made in region.incoming:
            match made.step:
                case Product(left, right):
                    step: Hashable = ("product", own(left), own(right))
                case Sum(parts):
                    step = ("sum", *map(own, parts))
                case _:
                    return None
            is_kept = normalise(made.polynomial).core in self._kept
            steps.append((own(made.polynomial), made.backward, is_kept, step))
        return (
            _dtype(region),
            tuple(
                [(own(p), root.backward, is_column_major(root.node)) for root, p in region.demands]
            ),
            tuple(steps),
            tuple([self._facts(leaf) for leaf in matrices]),
            frozenset(map(own, keepable)),
            tuple([(own(core), is_written) for core, is_written in scaled]),
        )

    def _scaled(self, region: Region) -> _Scaled:
        """What the graph scales, though plans need not; and if that is one more tensor in memory.

        A leaf that is scaled for a product is one more, unless one kernel makes and scales it. A
        product that is scaled in a sum is one more if the backward reads the sum. Otherwise the
        kernel that reads the sum scales and adds, and nothing is written.
        """
        scaled: dict[Polynomial, bool] = {}
        for made in region.incoming:
            step = made.step
            for operand in (step.left, step.right) if isinstance(step, Product) else ():
                leaf = _scaled_leaf(operand)
                if leaf is not None and self._facts(leaf).kind == "matrix":
                    scaled[normalise(operand).core] = not self._is_made_scaled(leaf)
        for root, part in region.demands:
            if len(root.parts) < 2 or root.backward:
                continue
            scalar, _, core = normalise(part)
            is_scaled = scalar.number not in _UNSCALED or scalar.leaves
            is_read_backward = map(self._phases.runs_backward, readers_of(root.node))
            if is_scaled and core.leaf is None and any(is_read_backward):
                scaled[core] = True
        return list(scaled.items())

    def _is_made_scaled(self, leaf: int) -> bool:
        """True if the kernel that makes a leaf can scale it."""
        sources = self._reader.leaves.matrices[leaf].sources
        return all(len(node.users) == 1 and is_pointwise(node.target) for node in sources)

    def _facts(self, index: int) -> _LeafFacts:
        """The facts of a leaf of the graph."""
        found = self._leaves.get(index)
        if found is not None:
            return found
        leaf, phases = self._reader.leaves.matrices[index], self._phases
        kind: Literal["matrix", "ones", "diagonal"] = "diagonal" if leaf.diagonal else "matrix"
        if leaf.is_ones:
            kind = "ones"
        backward = kind != "ones" and any(s in phases.gradients for s in leaf.sources)
        # A vector counts as held by the backward, because saving it costs next to nothing.
        held = (
            kind != "matrix"
            or index in self._read_backward
            or all(phases.held(self._reader, source) for source in leaf.sources)
        )
        fused = leaf.origin.product if isinstance(leaf.origin, Computed) else None
        packed = 0 if fused is None else fused.bits
        sizes = (leaf.batch, leaf.rows, leaf.cols)
        found = self._leaves[index] = _LeafFacts(
            sizes, leaf.batched, kind, backward, held, packed, leaf.images, leaf.taps
        )
        return found

    # -- a new problem -------------------------------------------------------------------------

    def _problem(
        self, region: Region, numbers: _Numbers, keepable: Iterable[Polynomial], scaled: _Scaled
    ) -> tuple[Problem, tuple[Dim, ...]]:
        """The problem of a region, and its dimensions."""
        matrices, _, assignments = numbers
        own_of: dict[Polynomial, Polynomial] = {}

        def own(p: Polynomial) -> Polynomial:
            found = own_of.get(p)
            if found is None:
                found = own_of[p] = substitute(p, *numbers)
            return found

        leaves = [_renamed(self._reader.leaves.matrices[i], numbers) for i in matrices]
        by = [self._reader.leaves.assignments[k] for k in assignments]
        dims = DimClasses(leaves, [own(p) for _, p in region.demands], by)
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
        shown: dict[Polynomial, bool] = {}
        for root, part in region.demands:
            _, transposed, core = normalise(own(part))
            shown.setdefault(core, transposed != is_column_major(root.node))
        dtype = _dtype(region)
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
            kept=kept | {normalise(own(core)).core for core in keepable},
            itemsize=int(dtype.itemsize),
            dtype=str(dtype).removeprefix("torch."),
            shown=tuple(shown.items()),
            scaled=tuple([(normalise(own(core)).core, is_written) for core, is_written in scaled]),
            assignments=tuple(
                Assignment(
                    "indexed" if a.kind == "indexed" else "grouped",
                    *dims.of_assignment(k),
                    a.multiple,
                )
                for k, a in enumerate(by)
            ),
        )
        return with_unpacking(problem), dims.sizes

    def _spec(self, own: int, index: int, dims: DimClasses) -> LeafSpec:
        """The specification of a leaf in a problem."""
        batch, rows, cols = dims.of(own)
        _, _, kind, backward, held, packed, images, taps = self._facts(index)
        picked = dims.leaves[own].picked
        return LeafSpec(rows, cols, batch, kind, backward, held, picked, packed, images, taps)


def _scaled_leaf(p: Polynomial) -> int | None:
    """The leaf that a polynomial is a multiple of, as in ``2 dY``; None for anything else."""
    if len(p.terms) != 1:
        return None
    ((word, number),) = p.terms
    is_scaled = number not in _UNSCALED or word.scalars
    return word.factors[0].leaf if is_scaled and len(word.factors) == 1 else None


def _renamed(leaf: Leaf, numbers: _Numbers) -> Leaf:
    """A leaf with the numbers of the problem in what it is picked from."""
    if leaf.picked is None:
        return leaf
    base, k = leaf.picked
    return replace(leaf, picked=Picked(numbers.matrices[base], numbers.assignments[k]))


def _dtype(region: Region) -> torch.dtype:
    val = example_of(region.demands[0][0].node)
    assert val is not None
    return val.dtype


def _sorted(cores: Iterable[Polynomial]) -> list[Polynomial]:
    return sorted(cores, key=lambda core: [word.sort_key() for word in core.words])
