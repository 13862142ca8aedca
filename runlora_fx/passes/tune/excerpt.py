"""Excerpts: a region of a graph with the pointwise operations around it, as a graph of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from runlora_fx.passes.levels.sizes import value_of
from runlora_fx.passes.read.expand import sources
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Region

#: How many pointwise operations in a row are taken along.
_DEPTH = 3


@dataclass(frozen=True)
class Excerpt:
    """A part of a graph.

    Attributes:
        module: Its graph: inputs that need no tangent first, then the tangents; outputs of the
            forward first, then those of the backward.
        forward_outputs: How many of the outputs are the forward's.
        is_joint: Whether there is a backward.
    """

    module: fx.GraphModule
    forward_outputs: int
    is_joint: bool


def excerpt(graph: fx.Graph, reader: GraphReader, phases: Phases, region: Region) -> Excerpt:
    """What computes a region's roots, with the pointwise operations before and after."""
    roots = {root.node for root, _ in region.demands}
    inner = _linear(reader, roots)
    before = _pointwise({n for node in inner for n in node.all_input_nodes} - inner, upwards=True)
    after = _pointwise({user for root in roots for user in root.users} - inner, upwards=False)
    # What stands behind a root must not be taken for one of its inputs.
    taken = inner | after | {node for node in before if node not in after}
    order = [node for node in graph.nodes if node in taken]
    given = [n for n in graph.nodes if n not in taken and any(u in taken for u in n.users)]
    given.sort(key=lambda node: node in phases.tangent)  # stable: in graph order otherwise

    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        name = "tangents" if node in phases.tangent else "primals"
        copies[node] = new.placeholder(f"{name}_{len(copies) + 1}")
        copies[node].meta = dict(node.meta)
    for node in order:
        copies[node] = new.node_copy(node, lambda n: copies[n])
    results = [
        node for node in order if not node.users or any(user not in taken for user in node.users)
    ]
    results.sort(key=phases.runs_backward)
    new.output(tuple(copies[node] for node in results))
    forward = sum(not phases.runs_backward(node) for node in results)
    is_joint = any(node in phases.tangent for node in given)
    return Excerpt(fx.GraphModule({}, new), forward, is_joint)


def _linear(reader: GraphReader, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The linear nodes that make roots, down to leaves and other roots."""
    found = set(roots)
    pending = list(found)
    while pending:
        for source in sources(reader.forms[pending.pop()]):
            if source not in found and source in reader.forms and source not in reader.stops:
                found.add(source)
                pending.append(source)
    return found


def _pointwise(around: set[fx.Node], *, upwards: bool) -> set[fx.Node]:
    """The pointwise operations that the compiler may fuse with what is next to them."""
    found: set[fx.Node] = set()
    for _ in range(_DEPTH):
        around = {node for node in around if _is_fusible(node)} - found
        found |= around
        around = {n for node in around for n in (node.all_input_nodes if upwards else node.users)}
    return found


def _is_fusible(node: fx.Node) -> bool:
    """Whether a node computes a tensor elementwise, and the same one every time."""
    if not isinstance(node.target, torch._ops.OpOverload) or value_of(node) is None:
        return False
    tags = node.target.tags
    random = torch.Tag.nondeterministic_seeded in tags
    return torch.Tag.pointwise in tags and not random and not node.target._schema.is_mutable
