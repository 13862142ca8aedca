"""The pass: read, search, emit, verify."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from runlora_fx._torch_compat import fake_mode_of, guard_range, size_hint
from runlora_fx.cost_model.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes import forms
from runlora_fx.passes.algebra import normalise
from runlora_fx.passes.budget import spend
from runlora_fx.passes.decide import Decision
from runlora_fx.passes.describe import describe
from runlora_fx.passes.dialects.base import Dialect
from runlora_fx.passes.dynamic import decide_all
from runlora_fx.passes.emit import Emitter
from runlora_fx.passes.forms import value_of
from runlora_fx.passes.opaque import opaque_nodes
from runlora_fx.passes.origin import unmatched
from runlora_fx.passes.phases import Phases, recompute, recompute_dropout_masks
from runlora_fx.passes.plan import Plan, Step, Value, product_step
from runlora_fx.passes.pricing import Pricing, may_measure
from runlora_fx.passes.read import GraphReader
from runlora_fx.passes.region import PosedProblem, Region, Regions, Root
from runlora_fx.passes.verify import VerificationError, verify
from runlora_fx.passes.writer import EmissionError, Writer
from runlora_fx.report import Refusal, Report

_log = logging.getLogger("runlora_fx")

#: Assumed size of a dimension that only the run knows (unbacked symbols) [elements].
_UNKNOWN_SIZE = 4096


@dataclass(frozen=True, eq=False)
class PlannedRegion:
    """A region, the problem it poses and what was decided about it."""

    region: Region
    posed: PosedProblem
    decision: Decision


class _EmissionFailedError(Exception):
    """Some regions could not be emitted; the graph is as it was."""

    def __init__(self, root: Root, cause: Exception) -> None:
        super().__init__(str(cause))
        self.root = root
        self.cause = cause


def rewrite_graph(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    machine: Machine | None = None,
    *,
    may_guard: bool = False,
) -> Report:
    """Rewrite a graph in place into its cheapest plan.

    Args:
        graph: Every tensor node has an example tensor in ``meta["val"]``.
        dialect: The level of the graph.
        options: What is asked of the pass.
        machine: What is known about the devices; what is stored about them, if None.
        may_guard: Whether guards on symbolic sizes can be made: they are checked before each call,
            and another size gets another graph.

    Returns:
        What was seen and done.

    Raises:
        VerificationError: Under ``strict``, if an emitted region is not what it was to be.
        EmissionError: Under ``strict``, if a plan cannot be written into the graph.
    """
    refused: dict[str, Refusal] = {}
    known = Machine(use_stored=options.tune != "off") if machine is None else machine
    pricing = Pricing(options, known, _device_of(graph))
    while True:
        try:
            return _attempt(graph, dialect, options, pricing, refused, may_guard)
        except _EmissionFailedError as failure:
            if options.strict:
                raise failure.cause from None
            name = failure.root.node.name
            _log.warning("runlora left %s as it came; please report this: %s", name, failure)
            refused[name] = Refusal(f"could not be rewritten ({failure})", (name,))


def _attempt(
    graph: fx.Graph,
    dialect: Dialect,
    options: Options,
    pricing: Pricing,
    refused: dict[str, Refusal],
    may_guard: bool,
) -> Report:
    mode = fake_mode_of(node.meta.get("val") for node in graph.nodes)

    def hint(size: forms.Dim) -> int:
        if isinstance(size, int):
            return size
        return size_hint(sympy.sympify(size), mode, _UNKNOWN_SIZE)

    reader = GraphReader(
        graph,
        dialect,
        opaque_nodes(graph, dialect),
        cross_casts=options.numerics == "relaxed",
    )
    phases = Phases(graph)
    regions = Regions(reader, phases, hint)
    posed = [regions.pose(region) for region in regions.regions]
    if options.tune in ("shapes", "plans") and may_measure():
        pricing.measure(p.problem for p in posed if not p.is_symbolic)

    def guard(size: sympy.Expr, low: int, high: int | None) -> bool:
        return guard_range(size, low, high, mode)

    decisions = decide_all(posed, pricing, hint, guard if may_guard else None)
    if options.memory_budget:
        decisions = spend(
            [None if p.is_symbolic else p.problem for p in posed],
            [pricing.objective(p.problem.dtype) for p in posed],
            decisions,
            options.memory_budget,
        )
    planned = [
        PlannedRegion(*found) for found in zip(regions.regions, posed, decisions, strict=True)
    ]

    if options.memory == "low" and phases.is_joint:
        recompute_dropout_masks(graph)
    changed = [
        p
        for p in planned
        if p.decision.changed and not any(r.node.name in refused for r, _ in p.region.demands)
    ]
    found = (
        describe(
            p.region, p.posed, p.decision, p in changed, pricing.objective(p.posed.problem.dtype)
        )
        for p in planned
    )
    sites = tuple(site for site in found if site is not None)
    missed = tuple(unmatched(graph, sites))
    if changed:
        touched = {root.node for p in changed for root, _ in p.region.demands}
        roots = [root for root in regions.roots if root.node in touched]
        plan = _whole_plan(planned, changed)
        existing = _existing(regions, reader)
        writer = Writer(graph, reader, dialect)
        emitter = Emitter(reader, phases, writer, plan, roots, existing, hint)
        _replace(graph, reader, writer, emitter, roots)
    return Report(
        graph="joint" if phases.is_joint else dialect.graph,
        sites=sites,
        refusals=(*refused.values(), *missed),
        flops_before=sum(int(p.decision.before.flops) for p in planned),
        flops_after=sum(
            int((p.decision.after if p in changed else p.decision.before).flops) for p in planned
        ),
    )


def _device_of(graph: fx.Graph) -> torch.device:
    """Where the graph computes: the accelerator, if any of its tensors is on one."""
    values = (value_of(node) for node in graph.nodes)
    devices = dict.fromkeys(value.device for value in values if value is not None)
    return next((d for d in devices if d.type not in ("cpu", "meta")), torch.device("cpu"))


def _whole_plan(planned: Collection[PlannedRegion], changed: Collection[PlannedRegion]) -> Plan:
    """One plan for the graph: the chosen steps where it changes, the incoming ones elsewhere."""
    steps: dict[Value, Step] = {}
    for p in planned:
        if p in changed:
            assert p.decision.plan is not None
            own = p.decision.plan
        else:
            first: dict[Value, Step] = {}
            for value, step in p.posed.problem.incoming:
                first.setdefault(value, step)
            own = Plan(first)
        steps.update(p.posed.in_graph(own).steps)
    return Plan(steps)


def _existing(
    regions: Regions, reader: GraphReader
) -> dict[tuple[Value, Step], tuple[fx.Node, bool]]:
    """Interior nodes that are products: a plan that makes the same product can take them."""
    found: dict[tuple[Value, Step], tuple[fx.Node, bool]] = {}
    for region in regions.regions:
        for made in region.incoming:
            is_plain = isinstance(reader.forms[made.node], forms.Product)
            if not (made.is_product and is_plain) or made.node in reader.stops:
                continue
            scalar, transposed, core = normalise(made.polynomial)
            if scalar.is_one:
                key = (Value(core, made.backward), product_step(*made.operands))
                found.setdefault(key, (made.node, transposed))
    return found


def _replace(
    graph: fx.Graph, reader: GraphReader, writer: Writer, emitter: Emitter, roots: list[Root]
) -> None:
    """Emit and verify every root, then put them all in the places of the old ones."""
    emitted: list[tuple[Root, fx.Node]] = []
    for root in roots:
        try:
            new = emitter.emit(root)
            verify(reader, new, root.node, root.polynomial)
        except Exception as error:
            writer.erase()
            if isinstance(error, VerificationError | EmissionError):
                raise _EmissionFailedError(root, error) from error
            raise
        # All roots are proven before any is replaced: until then the graph is only longer.
        emitted.append((root, new))
    for root, new in emitted:
        root.node.replace_all_uses_with(new)
    for node in emitter.recomputed:
        # Without the tag the partitioner would keep it: for a merged weight a second copy of every
        # adapted weight, from forward to backward.
        recompute(node)
    for node in reversed(list(graph.nodes)):
        if node in reader.forms and not node.users:
            graph.erase_node(node)
    graph.lint()
