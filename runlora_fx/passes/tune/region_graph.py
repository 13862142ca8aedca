"""Region graphs: one region and the pointwise operations around it, as a separate graph.

A plan is timed together with its neighbours, because the compiler fuses them. In ::

    h = gelu(z);  y = h @ w.T + 2 * (h @ a.T) @ b.T;  out = relu(y) + r

the region is what computes ``y``. Its graph has the inputs ``z, w, a, b, r`` and the output
``relu(y) + r``.

Invariant: the region graph computes the same as the whole graph from the same inputs. Everything
that its time depends on is in :attr:`RegionGraph.signature`, the layouts of its inputs included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from runlora_fx.passes.levels.operators import is_pointwise
from runlora_fx.passes.levels.origins import Computed
from runlora_fx.passes.levels.sizes import example_of
from runlora_fx.passes.read.calls import is_pure
from runlora_fx.passes.read.phases import Phases
from runlora_fx.passes.read.reader import GraphReader
from runlora_fx.passes.read.regions import Region

#: The largest number of pointwise operations in a row that are included on each side.
_DEPTH = 3


@dataclass(frozen=True)
class RegionGraph:
    """A region as a separate graph.

    Attributes:
        module: The graph. Its inputs are those of the forward, then the incoming gradients. Its
            outputs are those of the forward, then those of the backward.
        forward_outputs: The number of outputs of the forward.
        is_joint: True if there is a backward.
    """

    module: fx.GraphModule
    forward_outputs: int
    is_joint: bool

    @property
    def signature(self) -> str:
        """What its time depends on: its code, and the dtypes, shapes and strides of its inputs.

        Inputs that are not leaves of the problem count as well, such as a mask or a residual that
        is added behind the region. Nodes are numbered, so that equal layers have equal signatures
        in every process.
        """
        numbers = {node: i for i, node in enumerate(self.module.graph.nodes)}
        lines = []
        for node, i in numbers.items():
            if node.op == "placeholder":
                lines.append(f"%{i}: {_layout(node)}")
                continue
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: f"%{numbers[n]}")
            lines.append(f"%{i} = {_named(node.target)} {args} {kwargs}")
        return "\n".join(lines)


def region_graph(
    graph: fx.Graph, reader: GraphReader, phases: Phases, region: Region
) -> RegionGraph:
    """The nodes that compute a region's roots, and the pointwise operations before and after."""
    roots = {root.node for root, _ in region.demands}
    inner = _linear(reader, roots)
    inner |= _virtual(reader, {n for node in inner for n in node.all_input_nodes})
    before = _pointwise({n for node in inner for n in node.all_input_nodes} - inner, upwards=True)
    after = _pointwise({user for root in roots for user in root.users} - inner, upwards=False)
    # A node that depends on a root is not taken as an operation before the region.
    taken = inner | after | {node for node in before if node not in after}
    order = [node for node in graph.nodes if node in taken]
    given = [n for n in graph.nodes if n not in taken and any(u in taken for u in n.users)]
    given.sort(key=lambda node: node in phases.gradients)  # stable: in graph order otherwise

    new, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in given:
        name = "tangents" if node in phases.gradients else "primals"
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
    is_joint = any(node in phases.gradients for node in given)
    return RegionGraph(fx.GraphModule(graph.owning_module or {}, new), forward, is_joint)


def _named(target: object) -> str:
    """An operator's name, without the address of a function."""
    if isinstance(target, str | torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', type(target))}"


def _layout(node: fx.Node) -> str:
    """The dtype, shape, strides and device of an input."""
    val = example_of(node)
    if val is None:
        return str(node.meta.get("val"))
    # As text, because comparing symbolic sizes would add guards.
    shape, stride = (tuple(map(str, sizes)) for sizes in (val.shape, val.stride()))
    return f"{val.dtype} {shape} {stride} {val.device.type}"


def _linear(reader: GraphReader, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The linear nodes that compute some roots, from leaves and other roots."""
    found = set(roots)
    pending = list(found)
    while pending:
        form = reader.forms[pending.pop()]
        found.update(form.absorbed)
        for source in form.sources:
            if source not in found and source in reader.forms and source not in reader.stops:
                found.add(source)
                pending.append(source)
    return found


def _virtual(reader: GraphReader, nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that compute virtual leaves. As inputs they would become ordinary leaves."""
    origins = [leaf.origin for leaf in reader.leaves.matrices if isinstance(leaf.origin, Computed)]
    numbers = {part.key(reader.values) for origin in origins for part in origin.parts}
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found and reader.values.of(node) in numbers:
            found.add(node)
            pending.extend(node.all_input_nodes)
    return found


def _pointwise(around: set[fx.Node], *, upwards: bool) -> set[fx.Node]:
    """The pointwise operations next to some nodes, which the compiler may fuse."""
    found: set[fx.Node] = set()
    for _ in range(_DEPTH):
        around = {node for node in around if _is_fusible(node)} - found
        found |= around
        around = {n for node in around for n in (node.all_input_nodes if upwards else node.users)}
    return found


def _is_fusible(node: fx.Node) -> bool:
    """True if a node computes a tensor elementwise and without effects."""
    if not is_pointwise(node.target) or example_of(node) is None:
        return False
    return is_pure(node.target, node.args, node.kwargs)
