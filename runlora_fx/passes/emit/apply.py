"""Application: chosen plans, written into their graph, proven, and put in the places of the old."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from torch import fx

from runlora_fx.passes.algebra.plan import Plan, Step, Value, product_step
from runlora_fx.passes.algebra.polynomials import IDENTITY, normalise
from runlora_fx.passes.emit.dequantised import recompute_dequantised
from runlora_fx.passes.emit.emitter import Emitter
from runlora_fx.passes.emit.kept import stop_keeping_what_escapes
from runlora_fx.passes.emit.layout import is_relied_on
from runlora_fx.passes.emit.results import keep_results_apart, memory_of_results
from runlora_fx.passes.emit.verify import verify
from runlora_fx.passes.emit.writer import Writer
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.phases import recompute
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Regions, Root


class NotAppliedError(Exception):
    """A root could not be written or proven; the graph may be half changed.

    Attributes:
        root: The root.
        cause: What went wrong.
    """

    def __init__(self, root: Root, cause: Exception) -> None:
        """Say about which root what went wrong."""
        super().__init__(str(cause))
        self.root = root
        self.cause = cause


def apply(analysis: Analysis, plans: Mapping[int, Plan], lasting: Collection[fx.Node] = ()) -> None:
    """Rewrite a graph, inside a transaction of the caller's.

    Args:
        analysis: The graph as it came.
        plans: By the index of a region, what to compute it by; the others stay as they came.
        lasting: Inputs of which merged weights are kept from call to call.

    Raises:
        NotAppliedError: If a plan cannot be written, or is not what it was to be.
        Exception: If something else fails, once all roots are proven.
    """
    if not plans:
        return
    regions, reader = analysis.regions, analysis.reader
    touched = {root.node for i in plans for root, _ in regions.regions[i].demands}
    roots = [root for root in regions.roots if root.node in touched]
    writer = Writer(analysis.graph, reader, analysis.dialect)
    emitter = Emitter(
        reader,
        analysis.phases,
        writer,
        _whole_plan(analysis, plans),
        roots,
        _existing(regions, reader),
        _incoming(analysis),
        analysis.hint,
        lasting,
    )
    memory = memory_of_results(analysis.graph, analysis.effects)
    _replace(analysis.graph, reader, writer, emitter, roots)
    keep_results_apart(analysis.graph, memory, analysis.dialect.calls.clone)
    if analysis.phases.is_joint:
        leaves = (
            reader.leaves.matrices[leaf] for i in plans for leaf in analysis.posed[i].matrices
        )
        for node in dict.fromkeys(leaf.node for leaf in leaves if leaf.node is not None):
            recompute_dequantised(node, analysis.effects)
    if analysis.dialect.calls.merged is not None:
        stop_keeping_what_escapes(analysis.graph, analysis.dialect.calls.addmm)


def _whole_plan(analysis: Analysis, plans: Mapping[int, Plan]) -> Plan:
    """One plan for the graph: the chosen steps where it changes, the incoming ones elsewhere."""
    steps: dict[Value, Step] = {}
    for i, posed in enumerate(analysis.posed):
        own = plans.get(i)
        if own is None:
            first: dict[Value, Step] = {}
            for value, step in posed.problem.incoming:
                first.setdefault(value, step)
            own = Plan(first)
        steps.update(posed.in_graph(own).steps)
    return Plan(steps)


def _incoming(analysis: Analysis) -> set[tuple[Value, Step]]:
    """Every step of the graph as it came, in its own leaves."""
    found: set[tuple[Value, Step]] = set()
    for posed in analysis.posed:
        steps = [Plan({value: step}) for value, step in posed.problem.incoming]
        found |= {pair for plan in steps for pair in posed.in_graph(plan).steps.items()}
    return found


def _existing(
    regions: Regions, reader: GraphReader
) -> dict[tuple[Value, Step], tuple[fx.Node, bool]]:
    """Interior nodes that are products: a plan that makes the same product can take them."""
    found: dict[tuple[Value, Step], tuple[fx.Node, bool]] = {}
    for region in regions.regions:
        for made in region.incoming:
            is_plain = reader.forms[made.node].is_product
            if not (made.is_product and is_plain) or made.node in reader.stops:
                continue
            if _reads_identity(reader, made.node):
                continue  # it would drag a product with the identity matrix along
            scalar, transposed, core = normalise(made.polynomial)
            if scalar.is_one:
                key = (Value(core, made.backward), product_step(*made.operands))
                found.setdefault(key, (made.node, transposed))
    return found


def _reads_identity(reader: GraphReader, node: fx.Node) -> bool:
    """Whether a product takes, or is, a product with the identity matrix."""
    form = reader.forms.get(node)
    if form is None:
        return False
    factors = (operand for product in form.products for operand in product.operands(reader))
    if any(p == IDENTITY for operand in factors for p in operand):
        return True
    return any(
        _reads_identity(reader, source)
        for source in form.sources
        if source in reader.cuts and source not in reader.stops
    )


def _replace(
    graph: fx.Graph, reader: GraphReader, writer: Writer, emitter: Emitter, roots: list[Root]
) -> None:
    """Emit and verify every root, then put them all in the places of the old ones."""
    emitted: list[tuple[Root, fx.Node]] = []
    for root in roots:
        with _of_root(root):
            new = emitter.emit(root)
            verify(reader, new, root.node, root.polynomial)
        # All roots are proven before any is replaced: until then the graph is only longer.
        emitted.append((root, new))
    for root, new in emitted:
        with _of_root(root):
            root.node.replace_all_uses_with(new)
    for node in emitter.recomputed:
        # Without the tag the partitioner would keep it: for a merged weight a second copy of every
        # adapted weight, from forward to backward.
        recompute(node)
    for node in reversed(list(graph.nodes)):
        if node in reader.forms and not node.users:
            graph.erase_node(node)
    _drop_copies(graph, emitter.copied)


@contextmanager
def _of_root(root: Root) -> Iterator[None]:
    """A context in which whatever goes wrong is a failure to write a root."""
    try:
        yield
    except Exception as error:
        raise NotAppliedError(root, error) from error


def _drop_copies(graph: fx.Graph, copied: Mapping[fx.Node, fx.Node]) -> None:
    """Take out the copies of roots whose strides nobody relies on."""
    for copy, made in copied.items():
        if is_relied_on(copy):
            continue
        node = copy
        node.replace_all_uses_with(made)
        while node is not made and not node.users:
            below = node.all_input_nodes[0]
            graph.erase_node(node)
            node = below
