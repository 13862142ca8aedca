"""Notation: names for the matrices of a problem, and plans as formulas.

The plan that merges one adapter -> ::

    M = W + 2 B A
    Y = X M'

Invariant: every value that is used more than once has a line, and every demand has one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

import sympy

from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import (
    IDENTITY,
    Polynomial,
    Scalar,
    normalise,
    without_scalar,
)
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import (
    Accumulate,
    GroupedOuter,
    Keep,
    Pick,
    Product,
    ProductWithAll,
    Scatter,
    StackProduct,
    Step,
    Sum,
)
from runlora_fx.passes.algebra.words import Factor, Word
from runlora_fx.report.describe.expert_notation import assignment_name, by_expert


class Names:
    """Names of a problem's leaves and dimensions, in the field's own letters.

    ``X`` is the input of the base weight ``W`` and of the adapter ``A`` (down), ``B`` (up). A bias
    is ``b``, the gradient of the result ``dY``. Dimensions are ``N`` tokens, ``i`` inputs, ``o``
    outputs, ``r`` rank and ``E`` experts. ``W[k]`` are the weights of each token's expert, and
    ``sum_k(P)`` are the sums over the tokens of each expert.
    """

    def __init__(self, problem: Problem) -> None:
        """Name the leaves by their roles in the demands."""
        self._problem = problem
        self.leaves: dict[int, str] = {}
        self._dims: dict[int, str] = {}
        self._taken: Counter[str] = Counter()
        for assignment in problem.assignments:
            self._dim(assignment.tokens, "N")
            self._dim(assignment.experts, "E")
        forward = [demand.core for demand in problem.demands if not demand.backward]
        # The longest demand, a whole layer, shows the roles best. A norm of a weight may precede
        # it.
        for core in sorted(forward, key=_longest, reverse=True):
            self._name_forward(core)
        for i, spec in enumerate(problem.leaves):
            if i not in self.leaves:
                letter = "dY" if spec.backward else "L"
                self._name(i, {"ones": "1", "diagonal": "g"}.get(spec.kind, letter))
        for spec in problem.leaves:
            if spec.backward:
                self._dim(spec.rows, "N")
        for d in range(len(problem.dims)):
            self._dim(d, "d")
        self.symbols = tuple(
            sympy.Integer(1)
            if self._is_one_row(d)
            else sympy.Symbol(self._dims[d], positive=True, integer=True)
            for d in range(len(problem.dims))
        )

    @property
    def tokens(self) -> int | None:
        """The dimension that is the number of tokens; None if there is none."""
        return next((d for d, name in self._dims.items() if name == "N"), None)

    def _is_one_row(self, dim: int) -> bool:
        """True if a dimension is the row of a bias, or the one row of a token at its expert."""
        if any(leaf.kind == "ones" and leaf.cols == dim for leaf in self._problem.leaves):
            return True
        tokens = [assignment.tokens for assignment in self._problem.assignments]
        leaves = (leaf for leaf in self._problem.leaves if leaf.batch in tokens)
        is_side = any(dim in (leaf.rows, leaf.cols) for leaf in leaves)
        return is_side and self._problem.dims[dim] == 1

    def _name_forward(self, core: Polynomial) -> None:
        """Name the leaves of ``X W' + s (X A') B'``, or of its transpose."""
        turned = next((f.transposed for f in core.terms[-1][0].without_diagonals), False)
        words = [word.without_diagonals for word in (core.T if turned else core).words]
        for factors in sorted(words, key=len):
            if any(map(self.is_ones, factors)):
                self._name_bias(factors)
                continue
            roles = {2: ("X", "W"), 3: ("X", "A", "B")}.get(len(factors))
            if roles is None or (len(roles) == 3 and not self._is_adapter(factors, words)):
                continue
            for factor, role in zip(factors, roles, strict=True):
                self._name(factor.leaf, role)
            rows, cols = self._problem.extent(factors[0])
            self._dim(rows, "N")
            self._dim(cols, "i")
            self._dim(self._problem.extent(factors[-1])[1], "o")
            if len(factors) == 3:
                self._dim(self._problem.extent(factors[1])[1], "r")

    def _is_adapter(self, factors: tuple[Factor, ...], words: list[tuple[Factor, ...]]) -> bool:
        """True if ``X A' B'`` stands beside a base weight, or its rank is its smallest size."""
        sizes = [self._problem.dims[self._problem.extent(f)[1]] for f in factors]
        return min(map(len, words)) == 2 or sizes[1] < min(sizes[0], sizes[2])

    def _name_bias(self, factors: tuple[Factor, ...]) -> None:
        """Name the bias of ``1 b'``, a vector that the column of ones repeats."""
        for left, right in pairwise(factors):
            vector = right if self.is_ones(left) else left if self.is_ones(right) else None
            if vector is not None and 1 in self._sizes(vector):
                self._name(vector.leaf, "b")

    def _sizes(self, factor: Factor) -> tuple[int, ...]:
        """The sizes of a leaf during tracing."""
        return tuple(self._problem.dims[d] for d in self._problem.extent(factor))

    def is_ones(self, factor: Factor) -> bool:
        """True if a factor is the column of ones, which repeats a row, or its transpose."""
        return self._problem.leaves[factor.leaf].kind == "ones"

    def without_repeats(self, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
        """The factors of a word without ones that repeat a vector: ``1 b`` is written ``b``."""
        if len(factors) > 1 and self.is_ones(factors[0]) and not factors[0].transposed:
            factors = factors[1:]
        if len(factors) > 1 and self.is_ones(factors[-1]) and factors[-1].transposed:
            factors = factors[:-1]
        return factors

    def _name(self, leaf: int, letter: str) -> None:
        if leaf in self.leaves:
            return
        picked = self._problem.leaves[leaf].picked
        if picked is not None:
            self._name(picked.base, letter)
            self.leaves[leaf] = f"{self.leaves[picked.base]}[{assignment_name(picked.assignment)}]"
        else:
            self._taken[letter] += 1
            n = self._taken[letter]
            self.leaves[leaf] = letter if n == 1 and letter != "L" else f"{letter}{n}"

    def _dim(self, dim: int, letter: str) -> None:
        if dim not in self._dims:
            used = sum(name.rstrip("0123456789") == letter for name in self._dims.values())
            self._dims[dim] = letter if used == 0 and letter != "d" else f"{letter}{used + 1}"

    def factor(self, factor: Factor) -> str:
        """A leaf, its transpose or its diagonal matrix."""
        name = self.leaves[factor.leaf]
        if factor.diagonal:
            return f"diag({name})"
        return f"{name}'" if factor.transposed else name

    def without_ones(self, left: Polynomial, right: Polynomial) -> tuple[Polynomial, ...]:
        """The operands of a product without ones that repeat the other operand."""
        if left.leaf is not None and self.is_ones(left.leaf) and not left.leaf.transposed:
            return (right,)
        if right.leaf is not None and self.is_ones(right.leaf) and right.leaf.transposed:
            return (left,)
        return left, right

    def polynomial(self, p: Polynomial) -> str:
        """A polynomial in normal form."""
        return _added(scalar(Scalar(c, w.scalars)) + self._word(w) for w, c in p.terms)

    def _word(self, word: Word) -> str:
        text = " ".join(map(self.factor, self.without_repeats(word.factors))) or "I"
        if word.scattered:
            return f"sum_{assignment_name(word.scattered[0])}({text})"
        return f"diagonal({text})" if word.diag_part else text

    def is_of_weights(self, core: Polynomial) -> bool:
        """True if a value is computed from weights alone, without an activation or a gradient."""
        return all(self.leaves[i][0] in "WABbg1" for i in core.leaves)

    def demand(self, value: Value) -> tuple[str, bool]:
        """The name of a demand; True beside it if it is shown transposed."""
        _, rows, cols = self._problem.shape(value.core)
        if value.core.is_diag_part:
            return "dg", False
        if not value.backward:
            return "M" if self.is_of_weights(value.core) else "Y", self._dims[cols] == "N"
        for i, spec in enumerate(self._problem.leaves):
            if not spec.backward and spec.kind == "matrix" and spec.picked is None:
                if (spec.rows, spec.cols) == (rows, cols):
                    return f"d{self.leaves[i]}", False
                if (spec.rows, spec.cols) == (cols, rows):
                    return f"d{self.leaves[i]}", True
        return "G", False


def first_step(problem: Problem, names: Names, value: Value, step: Step) -> str:
    """The step that makes a value, its operands in normal form: ``X (W' + s A' B')``."""
    alone = Printer(replace(problem, demands=()), names, {}, {value: step})
    return alone.made(value, names.demand(value)[1])


def algebra(
    problem: Problem, names: Names, scalars: Mapping[Polynomial, Scalar], plan: Plan
) -> str:
    """A plan, one value a line.

    Args:
        problem: What the plan computes.
        names: The names of its leaves and dimensions.
        scalars: By demand, its scalar in the graph.
        plan: A step for every value.
    """
    return Printer(problem, names, scalars, plan.steps).lines()


def _longest(core: Polynomial) -> int:
    """The number of factors of the longest word."""
    return max(len(word.without_diagonals) for word in core.words)


def scalar(s: Scalar) -> str:
    """A scalar in front of a word; nothing if it is 1. Scalars of the graph are s, s_2, ..."""
    number = {1.0: "", -1.0: "-"}.get(s.number, f"{s.number:.6g} ")
    return number + "".join(f"s_{i + 1} " if i else "s " for i in s.leaves)


def _added(addends: Iterable[str]) -> str:
    return " + ".join(addends).replace("+ -", "- ")


def _is_sum(text: str) -> bool:
    return " + " in text or " - " in text


class Printer:
    """Prints a plan: a line for every demand and for every value that is used more than once.

    Attributes:
        results: By demand that has a line, its name.
    """

    def __init__(
        self,
        problem: Problem,
        names: Names,
        scalars: Mapping[Polynomial, Scalar],
        plan: Mapping[Value, Step],
    ) -> None:
        self.results: dict[Polynomial, str] = {}
        self._problem = problem
        self._names = names
        self._scalars = scalars
        self._plan = plan
        self._labels: dict[Polynomial, tuple[str, bool]] = {}
        self._lines: list[str] = []
        self._taken: Counter[str] = Counter()
        readers = {
            (normalise(p).core, value.core)
            for value, step in plan.items()
            if not isinstance(step, Keep)
            for p in step.operands
        }
        self._uses = Counter(core for core, _ in readers)

    def lines(self) -> str:
        """All lines. Names are given while they are written."""
        for value in self._problem.demands:
            if value.core not in self._labels:
                self._demand(value)
        return "\n".join(self._lines)

    def _demand(self, value: Value) -> None:
        """Write the line of a demand, after one without its scalar if other values read that."""
        name, turned = self._names.demand(value)
        front = scalar(self._scalars[value.core])
        if front and self._uses[value.core]:
            self._label(value, turned)
        right, is_sum = self._labels.get(value.core, ("", False))[0], False
        if not right:
            right = self.made(value, turned)
            is_sum = isinstance(self._step(value), Sum | Accumulate)
        name = self.results[value.core] = self._new_name(name)
        self._labels.setdefault(value.core, (name, turned))
        self._lines.append(
            f"{name} = {front}({right})" if front and is_sum else f"{name} = {front}{right}"
        )

    def line(self, value: Value) -> tuple[str, str, bool]:
        """The name of a value that has a line; what makes it; True if both are of its transpose."""
        name, turned = self._labels.get(value.core, ("", value.core.shown[0].transposed))
        return name, self.made(value, turned), turned

    def _step(self, value: Value) -> Step | None:
        step = self._plan.get(value) or self._plan.get(Value(value.core, False))
        return self._plan.get(Value(value.core, False)) if isinstance(step, Keep) else step

    def made(self, value: Value, turned: bool) -> str:
        """The formula that makes a value or its transpose; without a step, the normal form."""
        step = self._step(value)
        if step is None or isinstance(step, Keep):
            return self._names.polynomial(value.core.T if turned else value.core)
        if value.core.is_diag_part and isinstance(step, Product):
            rows = (step.left, step.right.T)
            both = " * ".join(self._operand(p, value.backward, inner=True) for p in rows)
            return f"rowsum({both})"
        step = step.turned if turned else step
        if isinstance(step, Sum):
            addends = sorted(step.operands, key=lambda p: p.size)
            return _added(self._operand(p, value.backward, inner=False) for p in addends)
        if isinstance(step, Accumulate):
            (s, left), (t, right) = without_scalar(step.left), without_scalar(step.right)
            texts = [self._operand(p, value.backward, inner=True) for p in (left, right)]
            addend = self._operand(step.addend, value.backward, inner=False)
            return _added((addend, f"{scalar(s * t)}{' '.join(texts)}"))
        if isinstance(step, Product):
            factors = self._names.without_ones(step.left, step.right)
            is_product = len(factors) > 1
            return " ".join(self._operand(p, value.backward, inner=is_product) for p in factors)
        return by_expert(
            step, [self._operand(p, value.backward, inner=True) for p in step.operands]
        )

    def _operand(self, p: Polynomial, backward: bool, *, inner: bool) -> str:
        """An operand: a leaf, a label, or how it is made; with brackets where they are needed."""
        s, transposed, core = normalise(p)
        front, value = scalar(s), Value(core, backward or self._is_gradient(core))
        text = self._named(value, transposed)
        if not text:
            text = self.made(value, transposed)
            if not isinstance(self._step(value), Pick | ProductWithAll | Scatter | GroupedOuter):
                # The normal form of a sum stands for one value, so it gets brackets.
                is_one = _is_sum(text) and (bool(front) or self._step(value) is None)
                return f"{front}({text})" if inner or is_one else front + text
        return f"({front}{text})" if front and inner else front + text

    def _named(self, value: Value, transposed: bool) -> str:
        """The name of a leaf, or of a value with a line of its own; nothing for other values."""
        core = value.core
        if core.leaf is not None:
            return self._names.factor(core.leaf.T if transposed else core.leaf)
        if core == IDENTITY:
            return "I"
        if core not in self._labels:
            if any(core == demand.core for demand in self._problem.demands):
                self._demand(value)
            elif self._uses[core] > 1:
                self._label(value, core.shown[0].transposed)
            else:
                return ""
        name, turned = self._labels[core]
        return name if turned == transposed else f"{name}'"

    def _label(self, value: Value, turned: bool) -> None:
        right = self.made(value, turned)
        name = self._new_name("M" if self._names.is_of_weights(value.core) else "Z")
        self._labels[value.core] = (name, turned)
        again = not value.backward and isinstance(
            self._plan.get(Value(value.core, True)), Product | Sum | Accumulate | StackProduct
        )
        self._lines.append(
            f"{name} = {right}" + ("   (recomputed in the backward)" if again else "")
        )

    def _new_name(self, stem: str) -> str:
        """``Z`` for the first value of a kind, ``Z2`` for the second."""
        self._taken[stem] += 1
        return stem if self._taken[stem] == 1 else f"{stem}{self._taken[stem]}"

    def _is_gradient(self, core: Polynomial) -> bool:
        return any(self._problem.leaves[i].backward for i in core.leaves)
