"""Notation: a problem's matrices by the field's names, and a plan as algebra a person can read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise

import sympy

from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import (
    IDENTITY,
    Factor,
    Polynomial,
    Scalar,
    Word,
    normalise,
)
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import (
    GroupedOuter,
    GroupedProduct,
    Keep,
    Pick,
    Product,
    Scatter,
    Step,
    Sum,
)


class Names:
    """Names of a problem's leaves and dimensions, in the field's own letters.

    ``X`` is the activation that the base weight ``W`` and the adapter ``A`` (down), ``B`` (up) act
    on, ``b`` a bias, ``dY`` the gradient of the result; ``N`` tokens, ``i`` in, ``o`` out, ``r``
    rank, ``E`` experts. ``W[k]`` are the weights that tokens have by the assignment ``k``, and
    ``sum_k(P)`` the sums over the tokens of each expert.
    """

    def __init__(self, problem: Problem) -> None:
        """Name the leaves by the roles that they have in the demands."""
        self._problem = problem
        self.leaves: dict[int, str] = {}
        self._dims: dict[int, str] = {}
        self._taken: Counter[str] = Counter()
        for assignment in problem.assignments:
            self._dim(assignment.tokens, "N")
            self._dim(assignment.experts, "E")
        forward = [demand.core for demand in problem.demands if not demand.backward]
        # The whole layer tells most about the roles; a norm of the merged weight may come before.
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
        """Whether a dimension is the one row of a bias, or that a token has among its expert's."""
        if any(leaf.kind == "ones" and leaf.cols == dim for leaf in self._problem.leaves):
            return True
        tokens = [assignment.tokens for assignment in self._problem.assignments]
        leaves = (leaf for leaf in self._problem.leaves if leaf.batch in tokens)
        is_side = any(dim in (leaf.rows, leaf.cols) for leaf in leaves)
        return is_side and self._problem.dims[dim] == 1

    def _name_forward(self, core: Polynomial) -> None:
        """``X W' + s (X A') B'``: the words of a forward demand, whichever way round it stands."""
        turned = next((f.transposed for f in core.terms[-1][0].without_diagonals), False)
        words = [word.without_diagonals for word in (core.T if turned else core).words]
        for factors in sorted(words, key=len):
            if any(map(self.is_ones, factors)):
                self._name_bias(factors)
                continue
            roles = {2: ("X", "W"), 3: ("X", "A", "B")}.get(len(factors))
            if roles is None:
                continue
            for factor, role in zip(factors, roles, strict=True):
                self._name(factor.leaf, role)
            rows, cols = self._problem.extent(factors[0])
            self._dim(rows, "N")
            self._dim(cols, "i")
            self._dim(self._problem.extent(factors[-1])[1], "o")
            if len(factors) == 3:
                self._dim(self._problem.extent(factors[1])[1], "r")

    def _name_bias(self, factors: tuple[Factor, ...]) -> None:
        """``1 b'``: the vectors that the column of ones repeats."""
        for left, right in pairwise(factors):
            vector = right if self.is_ones(left) else left if self.is_ones(right) else None
            if vector is not None and 1 in self._sizes(vector):
                self._name(vector.leaf, "b")

    def _sizes(self, factor: Factor) -> tuple[int, ...]:
        """The sizes of a leaf as the problem was traced."""
        return tuple(self._problem.dims[d] for d in self._problem.extent(factor))

    def is_ones(self, factor: Factor) -> bool:
        """Whether a factor is the column of ones that repeats a row, or its transpose."""
        return self._problem.leaves[factor.leaf].kind == "ones"

    def without_repeats(self, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
        """The factors of a word but for the ones that broadcast it: ``1 b`` is written ``b``."""
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
            self.leaves[leaf] = f"{self.leaves[picked.base]}[{_assignment(picked.assignment)}]"
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

    def step(self, value: Value, step: Step) -> str:
        """The first step towards a value, its operands in normal form."""
        if isinstance(step, Keep):
            return "kept from the forward"
        if isinstance(step, Product):
            shown = self.without_ones(step.left, _second(value, step))
            operands = [f"({p})" if " " in p else p for p in map(self.polynomial, shown)]
            return (
                f"rowsum({' * '.join(operands)})" if value.core.is_diag_part else " ".join(operands)
            )
        if not isinstance(step, Sum):
            operands = [f"({p})" if " " in p else p for p in map(self.polynomial, step.operands)]
            return by_expert(step, operands)
        return _added(f"({self.polynomial(p)})" for p in step.operands)

    def without_ones(self, left: Polynomial, right: Polynomial) -> tuple[Polynomial, ...]:
        """The operands of a product but for the ones that broadcast the other."""
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
            return f"sum_{_assignment(word.scattered[0])}({text})"
        return f"diagonal({text})" if word.diag_part else text

    def demand(self, value: Value) -> tuple[str, bool]:
        """What a demand is called, and whether it is shown transposed."""
        _, rows, cols = self._problem.shape(value.core)
        if value.core.is_diag_part:
            return "dg", False
        if not value.backward:
            return "Y", self._dims[cols] == "N"
        for i, spec in enumerate(self._problem.leaves):
            if not spec.backward and spec.kind == "matrix" and spec.picked is None:
                if (spec.rows, spec.cols) == (rows, cols):
                    return f"d{self.leaves[i]}", False
                if (spec.rows, spec.cols) == (cols, rows):
                    return f"d{self.leaves[i]}", True
        return "G", False


def algebra(
    problem: Problem, names: Names, scalars: Mapping[Polynomial, Scalar], plan: Plan
) -> str:
    """A plan, one value a line.

    Args:
        problem: What the plan computes.
        names: Of its leaves and dimensions.
        scalars: By demand, what it is scaled by in the graph.
        plan: A step for every value.
    """
    return _Printer(problem, names, scalars, plan.steps).lines()


def by_expert(step: Step, operands: list[str]) -> str:
    """A step that depends on the experts of tokens, its operands in brackets where they must be."""
    match step:
        case Pick(_, k):
            return f"{operands[0]}[{_assignment(k)}]"
        case GroupedProduct(_, _, k, "left"):
            return f"{operands[0]}[{_assignment(k)}] {operands[1]}"
        case GroupedProduct(_, _, k):
            return f"{operands[0]} {operands[1]}[{_assignment(k)}]"
        case Scatter(_, k) if operands[0].startswith("("):
            return f"sum_{_assignment(k)}{operands[0]}"
        case Scatter(_, k) | GroupedOuter(_, _, k):
            return f"sum_{_assignment(k)}({' '.join(operands)})"
    raise TypeError(f"{step} depends on no assignment")


def _assignment(k: int) -> str:
    return f"k{k + 1}" if k else "k"


def _longest(core: Polynomial) -> int:
    """Factors of the longest word."""
    return max(len(word.without_diagonals) for word in core.words)


def _second(value: Value, step: Product) -> Polynomial:
    """The right operand of a product as it is shown: row-wise dot products take its rows."""
    return step.right.T if value.core.is_diag_part else step.right


def scalar(s: Scalar) -> str:
    """A scalar in front of a word; nothing if it is 1. The graph's own symbols are s0, s1, ..."""
    number = {1.0: "", -1.0: "-"}.get(s.number, f"{s.number:.6g} ")
    return number + "".join(f"s_{i + 1} " if i else "s " for i in s.leaves)


def _added(addends: Iterable[str]) -> str:
    return " + ".join(addends).replace("+ -", "- ")


def _is_sum(text: str) -> bool:
    return " + " in text or " - " in text


class _Printer:
    """Prints a plan: a line for every demand and for every value that is used more than once."""

    def __init__(
        self,
        problem: Problem,
        names: Names,
        scalars: Mapping[Polynomial, Scalar],
        plan: Mapping[Value, Step],
    ) -> None:
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
        for value in self._problem.demands:
            if value.core not in self._labels:
                self._demand(value)
        return "\n".join(self._lines)

    def _demand(self, value: Value) -> None:
        """The line of a demand; one that other values read stands without its scalar."""
        name, turned = self._names.demand(value)
        front = scalar(self._scalars[value.core])
        if front and self._uses[value.core]:
            self._label(value, turned)
        right, is_sum = self._labels.get(value.core, ("", False))[0], False
        if not right:
            right = self._making(value, turned)
            is_sum = isinstance(self._step(value), Sum)
        self._taken[name] += 1
        name = name if self._taken[name] == 1 else f"{name}{self._taken[name]}"
        self._labels.setdefault(value.core, (name, turned))
        self._lines.append(
            f"{name} = {front}({right})" if front and is_sum else f"{name} = {front}{right}"
        )

    def _step(self, value: Value) -> Step | None:
        step = self._plan.get(value) or self._plan.get(Value(value.core, False))
        return self._plan.get(Value(value.core, False)) if isinstance(step, Keep) else step

    def _making(self, value: Value, turned: bool) -> str:
        step = self._step(value)
        if step is None or isinstance(step, Keep):
            return self._names.polynomial(value.core.T if turned else value.core)
        if value.core.is_diag_part and isinstance(step, Product):
            rows = (step.left, _second(value, step))
            both = " * ".join(self._operand(p, value.backward, inner=True) for p in rows)
            return f"rowsum({both})"
        operands = [p.T if turned else p for p in step.operands]
        if not isinstance(step, Sum):
            step = step.turned if turned else step
            shown: Iterable[Polynomial] = step.operands
            is_alone = False
            if isinstance(step, Product):
                factors = self._names.without_ones(step.left, step.right)
                shown, is_alone = factors, len(factors) == 1
            texts = [self._operand(p, value.backward, inner=not is_alone) for p in shown]
            return " ".join(texts) if isinstance(step, Product) else by_expert(step, texts)
        operands.sort(key=lambda p: p.size)
        return _added(self._operand(p, value.backward, inner=False) for p in operands)

    def _operand(self, p: Polynomial, backward: bool, *, inner: bool) -> str:
        """An operand: a leaf, a label, or how it is made; in brackets where it must be."""
        s, transposed, core = normalise(p)
        front, text = scalar(s), ""
        if core.leaf is not None:
            text = self._names.factor(core.leaf.T if transposed else core.leaf)
        elif core == IDENTITY:
            text = "I"
        if text:
            return f"({front}{text})" if front and inner else front + text
        value = Value(core, backward or self._tangent(core))
        if core not in self._labels:
            if any(core == demand.core for demand in self._problem.demands):
                self._demand(value)
            elif self._uses[core] > 1:
                self._label(value, core.shown[0].transposed)
        if core in self._labels:
            name, turned = self._labels[core]
            text = name if turned == transposed else f"{name}'"
            return f"({front}{text})" if front and inner else front + text
        text = self._making(value, transposed)
        if isinstance(self._step(value), Pick | Scatter | GroupedOuter):  # brackets of its own
            return f"({front}{text})" if front and inner else front + text
        return f"{front}({text})" if inner or (front and _is_sum(text)) else front + text

    def _label(self, value: Value, turned: bool) -> None:
        right = self._making(value, turned)
        stem = "M" if len(value.core) > 1 else "Z"
        n = sum(name.startswith(stem) for name, _ in self._labels.values())
        name = stem if n == 0 else f"{stem}{n + 1}"
        self._labels[value.core] = (name, turned)
        again = not value.backward and isinstance(
            self._plan.get(Value(value.core, True)), Product | Sum | GroupedProduct
        )
        self._lines.append(
            f"{name} = {right}" + ("   (made again in the backward)" if again else "")
        )

    def _tangent(self, core: Polynomial) -> bool:
        return any(self._problem.leaves[i].backward for i in core.leaves)
