"""Description: sites, the names of their matrices and their algebra, for the report.

A site is a region in which some word has three factors or more: a product of products, which can be
evaluated in more than one order. Plain linear layers are not sites.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import takewhile

import sympy
from torch import fx

from runlora_fx.cost_model.cost import Amount
from runlora_fx.passes.algebra import Factor, Polynomial, Scalar, normalise
from runlora_fx.passes.decide import Decision
from runlora_fx.passes.plan import (
    Keep,
    Plan,
    Problem,
    Product,
    Step,
    Sum,
    Value,
    incoming_cost,
)
from runlora_fx.passes.region import PosedProblem, Region
from runlora_fx.report import Candidate, Refusal, Site

#: Parts of a module path that belong to an adapter's inside.
_ADAPTER_PARTS = re.compile(r"^(lora_.*|base_layer)$")


def describe(region: Region, posed: PosedProblem, decision: Decision, changed: bool) -> Site | None:
    """A region as a site, or None where there is nothing low-rank about it."""
    problem = posed.problem
    if max(len(w.factors) for d in problem.demands for w in d.core.words) < 3:
        return None
    names = Names(problem)
    parts = [normalise(posed.own(part)) for _, part in region.demands]
    scalars = {part.core: part.scalar for part in reversed(parts)}
    before = _algebra(problem, names, scalars, _incoming_plan(problem))
    plan = decision.plan if changed else None
    symbols = names.symbols
    cost_before = incoming_cost(problem, symbols).flops
    cost_after = cost_before if plan is None else plan.cost(problem, symbols).flops
    return Site(
        modules=_modules(region),
        shapes=", ".join(f"{s}={size}" for s, size in zip(symbols, posed.dims, strict=True)),
        before=before,
        after=before if plan is None else _algebra(problem, names, scalars, plan),
        flops_before=int(decision.before.flops),
        flops_after=int((decision.after if changed else decision.before).flops),
        flops_before_expr=_expr(cost_before),
        flops_after_expr=_expr(cost_after),
        changed=changed,
        reason=decision.reason,
        considered=tuple(
            Candidate(names.step(problem.demands[0], a.step), int(a.cost.flops))
            for a in decision.alternatives
        ),
    )


def unmatched(graph: fx.Graph, sites: Iterable[Site]) -> Iterator[Refusal]:
    """Adapter modules of the graph that no site covers."""
    covered = {name for site in sites for name in site.modules}
    missed: dict[str, set[str]] = {}
    for node in graph.nodes:
        path = _path(node)
        parts = path.split(".")
        adapted = next((i for i, part in enumerate(parts) if part.startswith("lora_")), None)
        if adapted is None or node.op == "placeholder":
            continue
        name = ".".join(parts[:adapted])
        if name not in covered:
            missed.setdefault(name, set()).add(str(node.target).removesuffix(".default"))
    by_reason: dict[str, list[str]] = {}
    for name, targets in missed.items():
        reason = (
            f"no low-rank product of matrices was read (it computes {', '.join(sorted(targets))})"
        )
        by_reason.setdefault(reason, []).append(name)
    return (Refusal(reason, tuple(names)) for reason, names in by_reason.items())


class Names:
    """Names of a problem's leaves and dimensions, in the field's own letters.

    ``X`` is the activation that the base weight ``W`` and the adapter ``A`` (down), ``B`` (up) act
    on, ``dY`` the tangent of the result; ``N`` tokens, ``i`` in, ``o`` out, ``r`` rank.
    """

    def __init__(self, problem: Problem) -> None:
        """Name the leaves by the roles that they have in the demands."""
        self._problem = problem
        self.leaves: dict[int, str] = {}
        self._dims: dict[int, str] = {}
        self._taken: Counter[str] = Counter()
        for demand in problem.demands:
            if not demand.backward:
                self._name_forward(demand.core)
        for i, spec in enumerate(problem.leaves):
            if i not in self.leaves:
                letter = "1" if spec.kind == "ones" else ("dY" if spec.backward else "L")
                self._name(i, letter)
        for spec in problem.leaves:
            if spec.backward:
                self._dim(spec.rows, "N")
        for d in range(len(problem.dims)):
            self._dim(d, "d")
        self.symbols = tuple(
            sympy.Symbol(self._dims[d], positive=True, integer=True)
            for d in range(len(problem.dims))
        )

    def _name_forward(self, core: Polynomial) -> None:
        """``X W' + s (X A') B'``: the words of a forward demand, whichever way round it stands."""
        turned = core.terms[-1][0].factors[0].transposed
        words = sorted((core.T if turned else core).words, key=lambda w: len(w.factors))
        for word in words:
            roles = {2: ("X", "W"), 3: ("X", "A", "B")}.get(len(word.factors))
            if roles is None:
                continue
            for factor, role in zip(word.factors, roles, strict=True):
                if self._problem.leaves[factor.leaf].kind == "ones":
                    break
                self._name(factor.leaf, role)
            rows, cols = self._problem.extent(word.factors[0])
            self._dim(rows, "N")
            self._dim(cols, "i")
            self._dim(self._problem.extent(word.factors[-1])[1], "o")
            if len(word.factors) == 3:
                self._dim(self._problem.extent(word.factors[1])[1], "r")

    def _name(self, leaf: int, letter: str) -> None:
        if leaf not in self.leaves:
            self._taken[letter] += 1
            n = self._taken[letter]
            self.leaves[leaf] = letter if n == 1 and letter != "L" else f"{letter}{n}"

    def _dim(self, dim: int, letter: str) -> None:
        if dim not in self._dims:
            used = sum(name.rstrip("0123456789") == letter for name in self._dims.values())
            self._dims[dim] = letter if used == 0 and letter != "d" else f"{letter}{used + 1}"

    def factor(self, factor: Factor) -> str:
        """A leaf or its transpose."""
        name = self.leaves[factor.leaf]
        return f"{name}'" if factor.transposed else name

    def step(self, value: Value, step: Step) -> str:
        """The first step towards a value, its operands in normal form."""
        if isinstance(step, Keep):
            return "kept from the forward"
        if isinstance(step, Product):
            return " ".join(
                f"({p})" if " " in p else p for p in map(self.polynomial, step_operands(step))
            )
        return " + ".join(f"({self.polynomial(p)})" for p in step_operands(step))

    def polynomial(self, p: Polynomial) -> str:
        """A polynomial in normal form."""
        return " + ".join(
            f"{scalar(Scalar(c, w.scalars))}{' '.join(map(self.factor, w.factors))}"
            for w, c in p.terms
        )

    def demand(self, value: Value) -> tuple[str, bool]:
        """What a demand is called, and whether it is shown transposed."""
        _, rows, cols = self._problem.shape(value.core)
        if not value.backward:
            return "Y", self._dims[cols] == "N"
        for i, spec in enumerate(self._problem.leaves):
            if not spec.backward and spec.kind == "matrix":
                if (spec.rows, spec.cols) == (rows, cols):
                    return f"d{self.leaves[i]}", False
                if (spec.rows, spec.cols) == (cols, rows):
                    return f"d{self.leaves[i]}", True
        return "G", False


def step_operands(step: Product | Sum) -> tuple[Polynomial, ...]:
    """The operands of a step."""
    return step.parts if isinstance(step, Sum) else (step.left, step.right)


def scalar(s: Scalar) -> str:
    """A scalar in front of a word; nothing if it is 1."""
    number = "" if s.number == 1.0 else f"{s.number:.6g} "
    return number + "".join(f"s{i} " for i in s.leaves)


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
            for p in step_operands(step)
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
        operands = [p.T if turned else p for p in step_operands(step)]
        if isinstance(step, Product):
            if turned:
                operands.reverse()
            return " ".join(self._operand(p, value.backward, inner=True) for p in operands)
        operands.sort(key=lambda p: p.size)
        return " + ".join(self._operand(p, value.backward, inner=False) for p in operands)

    def _operand(self, p: Polynomial, backward: bool, *, inner: bool) -> str:
        """An operand: a leaf, a label, or how it is made; in brackets where it must be."""
        s, transposed, core = normalise(p)
        front = scalar(s)
        if core.leaf is not None:
            text = self._names.factor(core.leaf.T if transposed else core.leaf)
            return f"({front}{text})" if front and inner else front + text
        value = Value(core, backward or self._tangent(core))
        if core not in self._labels:
            if any(core == demand.core for demand in self._problem.demands):
                self._demand(value)
            elif self._uses[core] > 1:
                self._label(value, core.terms[0][0].factors[0].transposed)
        if core in self._labels:
            name, turned = self._labels[core]
            text = name if turned == transposed else f"{name}'"
            return f"({front}{text})" if front and inner else front + text
        text = self._making(value, transposed)
        return f"{front}({text})" if inner or (front and " + " in text) else front + text

    def _label(self, value: Value, turned: bool) -> None:
        right = self._making(value, turned)
        stem = "M" if len(value.core) > 1 else "Z"
        n = sum(name.startswith(stem) for name, _ in self._labels.values())
        name = stem if n == 0 else f"{stem}{n + 1}"
        self._labels[value.core] = (name, turned)
        again = not value.backward and isinstance(
            self._plan.get(Value(value.core, True)), Product | Sum
        )
        self._lines.append(
            f"{name} = {right}" + ("   (made again in the backward)" if again else "")
        )

    def _tangent(self, core: Polynomial) -> bool:
        return any(self._problem.leaves[i].backward for i in core.leaves)


def _algebra(
    problem: Problem, names: Names, scalars: Mapping[Polynomial, Scalar], plan: Plan
) -> str:
    return _Printer(problem, names, scalars, plan.steps).lines()


def _incoming_plan(problem: Problem) -> Plan:
    steps: dict[Value, Step] = {}
    for value, step in problem.incoming:
        steps.setdefault(value, step)
    return Plan(steps)


def _expr(amount: Amount) -> sympy.Expr:
    return sympy.expand(sympy.sympify(amount))


def _modules(region: Region) -> tuple[str, ...]:
    """The modules that a region comes from, adapters by the layer that they adapt."""
    paths = list(dict.fromkeys(filter(None, (_path(made.node) for made in region.incoming))))
    adapted: list[str] = []
    for path in paths:
        parts = path.split(".")
        inside = next((i for i, part in enumerate(parts) if _ADAPTER_PARTS.match(part)), None)
        if inside is not None:
            adapted.append(".".join(parts[:inside]))
    if adapted:
        return tuple(dict.fromkeys(adapted))
    levels = zip(*(path.split(".") for path in paths), strict=False)
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, levels)]
    return (".".join(common),) if common else _node_names(region)


def _node_names(region: Region) -> tuple[str, ...]:
    return tuple(dict.fromkeys(root.node.name for root, _ in region.demands))


def _path(node: fx.Node) -> str:
    """The dotted name of the module that a node comes from."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    entries: Sequence[object] = list(stack.values())
    path = entries[-1][0] if isinstance(entries[-1], tuple) else str(entries[-1])
    parts = re.sub(r"\['?([^'\]]*)'?\]", r".\1", path).split(".")
    while parts and parts[0] in ("", "L", "self", "L__self__"):
        del parts[0]
    return ".".join(part for part in parts if part not in ("", "__dict__", "_modules"))
