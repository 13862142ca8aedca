"""Sums of a plan: nested sums are flattened, and products become ``addmm`` steps.

Before -> after: ``P = B A; Q = W + 2 P; M = Q + L`` -> ``M = (W + L) + 2 B A``. One step, an
``addmm``, runs the product and the last addition.

A demand stays a plain sum, because Inductor fuses its additions with its reader. A sum of batches
stays too, and so does a sum whose product has another reader.

Invariant: the price of a plan does not change, because every addition has the same price.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.algebra.polynomials import IDENTITY, Polynomial, normalise, without_scalar
from runlora_fx.passes.algebra.problem import Problem, Value
from runlora_fx.passes.algebra.steps import Accumulate, Keep, Product, Step, Sum


def reads(problem: Problem, steps: Mapping[Value, Step]) -> Counter[Value]:
    """By value, how often steps read it. A saved value reads that of the forward."""
    found: Counter[Value] = Counter()
    for value, step in steps.items():
        if isinstance(step, Keep):
            found[Value(value.core, False)] += 1
        found.update(problem.value(p, value.backward) for p in step.operands)
    return found


def flattened(problem: Problem, steps: Mapping[Value, Step]) -> dict[Value, Step]:
    """The same steps, with every sum that only one other sum reads merged into that one."""
    uses = reads(problem, steps)  # a sum may read one value twice, as it is and transposed
    absorbed: set[Value] = set()

    def parts(value: Value, step: Sum) -> Iterator[Polynomial]:
        for part in step.parts:
            scalar, transposed, core = normalise(part)
            below = problem.value(core, value.backward)
            inner = steps.get(below)
            if isinstance(inner, Sum) and uses[below] == 1 and below not in problem.demands:
                absorbed.add(below)
                yield from ((p.T if transposed else p).scaled(scalar) for p in parts(below, inner))
            else:
                yield part

    flat = {v: Sum(tuple(parts(v, s))) if isinstance(s, Sum) else s for v, s in steps.items()}
    return {value: step for value, step in flat.items() if value not in absorbed}


def accumulated(problem: Problem, plan: Plan) -> Plan:
    """The same plan, with sums and their products combined to ``addmm`` steps."""
    return _Accumulation(problem, plan, reads(problem, plan.steps)).run()


@dataclass(frozen=True)
class _Accumulation:
    problem: Problem
    plan: Plan
    reads: Counter[Value]

    def run(self) -> Plan:
        steps = dict(self.plan.steps)
        for value, step in self.plan.steps.items():
            is_root_alone = value in self.problem.demands and not self.reads[value]
            if isinstance(step, Sum) and not is_root_alone:
                self._add_up(value, step, steps)
        names = {value: n for value, n in self.plan.implementations.items() if value in steps}
        for value, step in steps.items():
            if step != self.plan.steps.get(value):
                names.pop(value, None)
        return Plan(steps, names)

    def _add_up(self, value: Value, step: Sum, steps: dict[Value, Step]) -> None:
        """Replace a sum and the products that it reads by ``addmm`` steps."""
        products = [p for p in step.parts if self._factors(value, p) is not None]
        last = [p for p in step.parts if normalise(p).core == IDENTITY]
        first = [p for p in step.parts if p not in products and p not in last]
        if not first:
            first, products = products[:1], products[1:]
        if not products or (len(first) > 1 and self._has_broadcast(first)):
            return
        base = sum(first[1:], first[0])
        done = list(accumulate(products, initial=base))
        if not all(p.terms for p in done):
            return
        if len(first) > 1:
            self._make(steps, base, value.backward, Sum(tuple(first)))
        for p, addend, made in zip(products, done, done[1:], strict=False):
            factors = self._factors(value, p)
            assert factors is not None
            del steps[self.problem.value(p, value.backward)]
            if made is not done[-1] or last:
                self._make(steps, made, value.backward, Accumulate(*factors, addend))
            else:
                steps[value] = Accumulate(*factors, addend)
        if last:
            steps[value] = Sum((done[-1], *last))

    def _make(self, steps: dict[Value, Step], made: Polynomial, backward: bool, step: Step) -> None:
        """Add a step, unless its value has one already."""
        steps.setdefault(self.problem.value(made, backward), step.making(made))

    def _has_broadcast(self, parts: list[Polynomial]) -> bool:
        kinds = [self.problem.leaves[leaf].kind for p in parts for leaf in p.leaves]
        return "ones" in kinds

    def _factors(self, reader: Value, p: Polynomial) -> tuple[Polynomial, Polynomial] | None:
        """The scaled operands of an addend that is a plain product with one reader; or None."""
        scalar, transposed, core = normalise(p)
        below = self.problem.value(core, reader.backward)
        step = self.plan.steps.get(below)
        if not isinstance(step, Product) or below in self.problem.demands:
            return None
        is_plain = self.plan.implementation(self.problem, below) == "matmul"
        if not is_plain or self.problem.shape(core)[0] is not None:
            return None
        # The product must have one reader in both phases: if the steps are equal, it is emitted
        # once.
        phases = (below, Value(core, not below.backward))
        if any(self.reads[value] != 1 for value in phases if value in self.plan.steps):
            return None
        turned = step.turned if transposed else step
        left, right = turned.operands[0], turned.operands[1].scaled(scalar)
        leaves = without_scalar(left)[0].leaves + without_scalar(right)[0].leaves
        return None if leaves else (left, right)
