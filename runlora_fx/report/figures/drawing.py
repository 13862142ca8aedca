"""Drawing: a plan becomes boxes and edges, with the sizes, FLOPs and bytes of every step.

    Y = X M', M = W + B A    ->    Box("M", "W + B A", "product", "384x32 · 32x384"), ...

Invariant: a box stands for a value in one phase. Values that the backward takes from the forward
have one box, and the edge says that they are saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import Convolution, GroupedMatMul, MatMul, Merge, Operation
from runlora_fx.passes.algebra.plan import Plan, step_operations, total_cost
from runlora_fx.passes.algebra.polynomials import IDENTITY, Polynomial, Scalar, leaf
from runlora_fx.passes.algebra.problem import Problem, Value, is_broadcast
from runlora_fx.passes.algebra.steps import Accumulate, Keep, Product, Step, Sum
from runlora_fx.report.describe.notation import Names, Printer, scalar
from runlora_fx.report.figures.figures import Box, Drawing, Edge, Kind

#: The largest plan that is drawn [steps]. The plan of a LoRA layer has about ten.
MOST_STEPS = 60


def drawn(
    problem: Problem,
    names: Names,
    scalars: Mapping[Polynomial, Scalar],
    plan: Plan,
    objective: Objective,
) -> Drawing | None:
    """A plan as a drawing; None if it has too many steps.

    Args:
        problem: What the plan computes.
        names: The names of its leaves and dimensions.
        scalars: By demand, its scalar in the graph.
        plan: A step for every value.
        objective: The objective that ranked plans.
    """
    if len(plan.steps) > MOST_STEPS:
        return None
    drawer = _Drawer(problem, names, scalars, plan, objective)
    for demand in problem.demands:
        drawer.demand(demand)
    return Drawing(tuple(drawer.boxes), tuple(drawer.edges))


class _Drawer:
    """Makes the boxes and edges of one plan, operands first."""

    def __init__(
        self,
        problem: Problem,
        names: Names,
        scalars: Mapping[Polynomial, Scalar],
        plan: Plan,
        objective: Objective,
    ) -> None:
        self.boxes: list[Box] = []
        self.edges: dict[Edge, None] = {}
        self._problem = problem
        self._names = names
        self._scalars = scalars
        self._plan = plan
        self._objective = objective
        self._places: dict[Value, int] = {}
        self._printer = Printer(problem, names, scalars, plan.steps)
        self._printer.lines()  # gives the names

    def demand(self, value: Value) -> None:
        """Draw a value that the region has to compute, and what it is made of."""
        place = self._place(value)
        front = scalar(self._scalars[value.core])
        name, result = self._printer.line(value)[0], self._printer.results[value.core]
        if name == result:
            self.boxes[place] = replace(self.boxes[place], is_result=True)
        else:  # other steps read the value without its scalar
            sizes = self._sizes(value.core, turned=self._names.demand(value)[1])
            box = Box(result, front + name, "other", sizes, value.backward, is_result=True)
            self._add(box, (place,))

    def _add(self, box: Box, operands: tuple[int, ...]) -> int:
        """Add a box and an edge from each of its operands."""
        self.boxes.append(box)
        target = len(self.boxes) - 1
        for source in operands:
            came = self.boxes[source]
            is_saved = box.is_backward and not came.is_backward and came.kind != "input"
            self.edges[Edge(source, target, is_saved)] = None
        return target

    def _place(self, value: Value) -> int:
        """The position of the box of a value, which is drawn if it is not there yet."""
        if value in self._places:
            return self._places[value]
        step = self._plan.steps.get(value)
        forward = Value(value.core, False)
        if value.core.leaf is None and (step is None or isinstance(step, Keep)):
            if value.backward and forward in self._plan.steps:
                place = self._place(forward)
            else:
                place = self._unknown(value)
        elif step is None or value.core.leaf is not None:
            place = self._given(value)
        else:
            place = self._made(value, step)
        self._places[value] = place
        return place

    def _given(self, value: Value) -> int:
        """Draw a leaf. A packed one has a step that unpacks it."""
        assert value.core.leaf is not None
        name = self._names.leaves[value.core.leaf.leaf]
        box = Box(name, "", "input", self._sizes(value.core, turned=False), value.backward)
        step = self._plan.steps.get(value)
        return self._add(box if step is None else self._priced(box, value, step), ())

    def _unknown(self, value: Value) -> int:
        """Draw a value without a step of its own: in the graph, the step made a part of it."""
        core = value.core
        if core == IDENTITY:
            return self._add(Box("I", "", "input", "", value.backward), ())
        leaves = (Value(leaf(i), value.backward) for i in sorted(core.leaves))
        operands = tuple(map(self._place, leaves))
        sizes = self._sizes(core, turned=False)
        box = Box("", self._names.polynomial(core), "other", sizes, value.backward)
        return self._add(box, operands)

    def _made(self, value: Value, step: Step) -> int:
        """Draw a step, after what it reads."""
        if isinstance(step, Product) and is_broadcast(self._problem.leaves, *step.operands):
            # Ones only repeat the other operand, which the drawing shows in place of the product.
            (factor,) = self._names.without_ones(step.left, step.right)
            return self._place(self._read(factor, value))
        operands = tuple(self._place(self._read(p, value)) for p in step.operands)
        name, formula, turned = self._printer.line(value)
        front = scalar(self._scalars.get(value.core, Scalar()))
        if front and name == self._printer.results.get(value.core):
            is_sum = isinstance(step, Sum | Accumulate)
            formula = f"{front}({formula})" if is_sum else front + formula
        is_again = value.backward and self._is_computed(Value(value.core, False))
        sizes = self._sizes(value.core, turned)
        box = Box(name, formula, "other", sizes, value.backward, is_again=is_again)
        return self._add(self._priced(box, value, step, turned), tuple(dict.fromkeys(operands)))

    def _is_computed(self, value: Value) -> bool:
        return not isinstance(self._plan.steps.get(value, Keep()), Keep)

    def _read(self, operand: Polynomial, reader: Value) -> Value:
        """The value of an operand. A leaf has a box in each phase that reads it."""
        value = self._problem.value(operand, reader.backward)
        return Value(value.core, reader.backward) if value.core.leaf is not None else value

    def _priced(self, box: Box, value: Value, step: Step, turned: bool = False) -> Box:
        """The box of a step with its kind, its sizes and what it costs."""
        name = self._plan.implementations.get(value)
        operations = step_operations(self._problem, value.core, step, None, name)
        cost = total_cost(operations)
        product = next((one for one in map(lambda o: _product(o, turned), operations) if one), "")
        if box.kind != "input":
            kind: Kind = "product" if product else "sum" if isinstance(step, Sum) else "other"
            box = replace(box, kind=kind, sizes=product or box.sizes)
        is_timed = self._objective.name == "time"
        seconds = sum(map(self._objective.profile.seconds, operations)) if is_timed else None
        return replace(box, flops=int(cost.flops), bytes=int(cost.bytes), seconds=seconds)

    def _sizes(self, core: Polynomial, turned: bool) -> str:
        """The sizes of a value, or of its transpose."""
        batch, *sides = self._problem.shape(core)
        sizes = [self._problem.dims[d] for d in (reversed(sides) if turned else sides)]
        leaf = core.leaf
        is_vector = leaf is not None and self._problem.leaves[leaf.leaf].kind != "matrix"
        if core.is_diag_part or is_vector:
            sizes = sizes[:1]
        return _times(1 if batch is None else self._problem.dims[batch], *sizes)


def _product(operation: Operation, turned: bool) -> str:
    """The sizes of the operands of a product; empty for other operations."""
    match operation:
        case Convolution(m, k, n):
            rows, cols = (n, m) if turned else (m, n)
            return f"{rows}x{k} · {k}x{cols}, a convolution"
        case MatMul(b, m, k, n):
            rows, cols = (n, m) if turned else (m, n)
            both = f"{rows}x{k} · {k}x{cols}"
            return both if b == 1 else f"{b} of {both}"
        case Merge(rows, cols, rank):
            return f"{rows}x{rank} · {rank}x{cols}"
        case GroupedMatMul(tokens, experts, rows, cols, _, True):
            return f"{rows}x{tokens} · {tokens}x{cols}, by {experts} experts"
        case GroupedMatMul(tokens, experts, rows, cols):
            return f"{tokens}x{rows} · {rows}x{cols} of {experts} experts"
    return ""


def _times(batch: int, *sizes: int) -> str:
    text = "x".join(map(str, sizes))
    return text if batch == 1 else f"{batch} of {text}"
