"""Application: write plans into a graph, prove the new roots, replace the old ones by them.

    root = add(mm(X, W'), mm(mm(X, A'), B'))      ->      root = mm(X, addmm(W, B, A)')

Invariant: no old root is replaced before all new roots are proven.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import fx

from runlora_fx.passes.algebra.plan import Plan
from runlora_fx.passes.emit.copies.roots import Copies
from runlora_fx.passes.emit.graph.kept import stop_keeping_what_escapes
from runlora_fx.passes.emit.graph.recompute import recompute, recompute_dequantised
from runlora_fx.passes.emit.graph.results import keep_results_apart, memory_of_results
from runlora_fx.passes.emit.nodes.inserter import hand_over
from runlora_fx.passes.emit.nodes.layout import is_relied_on
from runlora_fx.passes.emit.nodes.writer import Writer
from runlora_fx.passes.emit.proof.order import check_order
from runlora_fx.passes.emit.proof.probe import probe
from runlora_fx.passes.emit.proof.verify import VerificationError
from runlora_fx.passes.emit.steps.emitter import Emitted, Emitter
from runlora_fx.passes.emit.steps.task import Task
from runlora_fx.passes.levels.level import asks_about
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Root


class NotAppliedError(Exception):
    """A root could not be written or proven; the graph is left half changed.

    Attributes:
        root: The root.
        cause: What went wrong.
    """

    def __init__(self, root: Root, cause: Exception) -> None:
        """Name the root, and what went wrong with it."""
        super().__init__(str(cause))
        self.root = root
        self.cause = cause


def apply(analysis: Analysis, plans: Mapping[int, Plan], *, probes: bool = False) -> None:
    """Rewrite a graph. The caller opens a transaction around the call.

    Args:
        analysis: The graph as it came.
        plans: The plan of each region, by its index. The other regions stay as they came.
        probes: True to compare the old and the new value of every root on random numbers too.

    Raises:
        NotAppliedError: If a root cannot be written or proven.
        Exception: If something else fails after all roots are proven.
    """
    if not plans:
        return
    task = Task(analysis, plans)
    writer = Writer(analysis.graph, analysis.reader, analysis.dialect)
    memory = memory_of_results(analysis.graph, analysis.effects)
    _replace(task, writer, probes=probes)
    keep_results_apart(analysis.graph, memory, analysis.dialect.calls.clone)
    if analysis.phases.is_joint:
        matrices = analysis.reader.leaves.matrices
        held = [matrices[leaf].node for i in plans for leaf in analysis.posed[i].matrices]
        of_forward = (n for n in dict.fromkeys(held) if n and n not in analysis.reader.gradients)
        recompute_dequantised(of_forward, analysis.effects)
    if analysis.dialect.calls.merged_weight is not None:
        stop_keeping_what_escapes(analysis.graph, analysis.dialect.calls.addmm)


def _replace(task: Task, writer: Writer, *, probes: bool) -> None:
    """Emit and verify every root, then replace all old roots by the new ones."""
    graph, reader = task.analysis.graph, task.analysis.reader
    copies = Copies(task, writer, Emitter(task, writer))
    emitted: list[tuple[Root, Emitted]] = []
    for root in task.roots:
        with _of_root(root):
            # All roots are proven before any is replaced: until then nodes are only added.
            emitted.append((root, copies.write(root)))
    _check_order(task, emitted)
    for root, new in emitted if probes else ():
        with _of_root(root):
            probe(task.analysis, root.node, new.node, writer.written)
    for root, new in emitted:
        with _of_root(root):
            readers = list(root.node.users)
            hand_over(root.node, new.node)
            if not all(reader in new.node.users for reader in readers):
                raise VerificationError(f"{root.node.name}: its readers read another root")
    for call, holder in reader.linear.asked_sizes.items():
        call.args = holder  # so that no product stays only because its size is read
    # Without the tag the partitioner would save them. A saved merged weight is a second copy of the
    # adapted weight that lives from the forward to the backward.
    again = [node for _, new in emitted for node in new.recomputed]
    recompute([*again, *writer.picked], writer.written)
    # The same holds for a quantised weight that is written in full precision.
    recompute(writer.materialised, writer.written)
    given_up = {*writer.own, *reader.forms, *reader.linear.absorbed}
    for node in reversed(list(graph.nodes)):
        if node in given_up:
            if reader.linear.asking:
                _ask_another(reader, node)
            if not node.users:
                graph.erase_node(node)
    _drop_copies(graph, [both for _, new in emitted for both in new.copied])


def _check_order(task: Task, emitted: Sequence[tuple[Root, Emitted]]) -> None:
    """Check on which side of writes to memory everything was written."""
    graph, effects = task.analysis.graph, task.analysis.effects
    for root, new in emitted if effects.writing else ():
        with _of_root(root):
            check_order(graph, effects, [(root.node, new.written)])


def _ask_another(reader: GraphReader, node: fx.Node) -> None:
    """Let users that read only a node's dtype or device read them from one of its sources."""
    if not node.users or not all(map(asks_about, node.users)):
        return
    if node not in reader.forms:
        reader.classify(node)
    other = reader.linear.stand_in(node)
    if other is not None:
        for user in list(node.users):
            user.replace_input_with(node, other)


@contextmanager
def _of_root(root: Root) -> Iterator[None]:
    """A context that turns every exception into a :class:`NotAppliedError` of a root."""
    try:
        yield
    except Exception as error:
        raise NotAppliedError(root, error) from error


def _drop_copies(graph: fx.Graph, copied: Iterable[tuple[fx.Node, fx.Node]]) -> None:
    """Remove the copies that restore a root's strides, where no reader relies on the strides."""
    for copy, made in copied:
        if is_relied_on(copy):
            continue
        node = copy
        node.replace_all_uses_with(made)
        while node is not made and not node.users:
            below = node.all_input_nodes[0]
            graph.erase_node(node)
            node = below
