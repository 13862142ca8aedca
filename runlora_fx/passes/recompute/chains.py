"""Chains: pointwise operators that can compute a saved tensor again from other saved tensors.

    n = norm(h);  y = n W';  ...;  dA = z' n      n is saved for dA, h for the norm's gradient
    ->  Chain(made=n, nodes=(..., n), sources=(h, rstd))

A product of the backward reads its operand from memory, so the partitioner saves the operand. If
all that the operand is computed from is saved too, for another reason, the backward can compute it
again.

Invariant: a chain writes to no memory, draws no random numbers but from seeds, and contains no node
that the user has tagged.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias

import torch
from torch import fx

from runlora_fx._torch_compat import repeats_random_operators
from runlora_fx.cost_model.cost import Cost
from runlora_fx.passes.context import Context
from runlora_fx.passes.emit.graph.packed_masks import packed_dim
from runlora_fx.passes.levels.operators import CASTS, REDUCTIONS, VIEWS, is_pointwise, readers_of
from runlora_fx.passes.levels.sizes import example_of, numel, shape_of
from runlora_fx.passes.read.gradients import gradient_nodes
from runlora_fx.passes.read.phases import Phases

_aten = torch.ops.aten

_RANDOM = (_aten.rand.default, _aten.rand_like.default)

#: Functions that, on some devices, take longer than moving the bytes of their element.
SPECIAL = (
    *(_aten.exp.default, _aten.sigmoid.default, _aten.tanh.default, _aten.erf.default),
    *(_aten.rsqrt.default, _aten.sqrt.default, _aten.sin.default, _aten.cos.default),
    *(_aten.log.default, _aten.log1p.default, _aten.expm1.default, _aten.div.Tensor),
    *(_aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor),
)

#: Besides pointwise operators: Inductor computes them in one kernel with what they read.
_FUSED = CASTS | VIEWS | REDUCTIONS

#: The largest number of sources of a chain. Reading many tensors gains little over reading one.
_MOST_SOURCES = 8


#: What becomes of a tensor that is not saved as it is.
Kind: TypeAlias = Literal["tensor", "drawn", "packed"]


@dataclass(frozen=True)
class Chain:
    """A tensor that can be recomputed.

    Attributes:
        made: The tensor, which is saved unless the chain is recomputed.
        nodes: The nodes that compute it, in graph order, the tensor itself last; none for a mask
            that is saved as bits.
        sources: The tensors that it is computed from.
        size: The bytes that are not saved, but for the sources [B].
        cost: The cost of recomputing it. For a mask it is less the cost of writing and reading it,
            because Inductor draws a mask inside of the kernel that uses it.
        kind: ``"tensor"``, or of a mask, ``"drawn"`` again or ``"packed"`` into bits.
    """

    made: fx.Node
    nodes: tuple[fx.Node, ...]
    sources: frozenset[fx.Node]
    size: int
    cost: Cost
    kind: Kind = "tensor"


class Chains:
    """The chains of a joint graph.

    Attributes:
        kept: The tensors that count as saved: those that the backward reads and that are no chains,
            and the sources of chains that were taken.
        fewer_bytes: How much less is saved by the chains that were taken [B].
        forward: The operators of the forward, in graph order.
        read: Those whose results the backward reads, in graph order.
        again: The nodes that the backward runs for the chains that were taken.
        hint: A dimension's size when the graph was traced.
    """

    def __init__(self, context: Context) -> None:
        """Find the tensors that the backward reads, in a graph whose plans are written."""
        graph = context.graph
        self._effects = context.effects()
        self.hint = context.hint
        self._phases = Phases(graph, gradient_nodes(graph), self._effects)
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._draws_again = context.draws_again
        self._redrawn: set[fx.Node] = set()
        self._packed: set[fx.Node] = set()
        self.kept: set[fx.Node] = set()
        self.fewer_bytes = 0
        self.again: set[fx.Node] = set()
        self.forward = [
            node
            for node in graph.nodes
            if node.op == "call_function" and not self._phases.runs_backward(node)
        ]
        self.read = [n for n in self.forward if any(map(self.runs_backward, n.users))]
        cuts = self._cuts()
        self._written = [node for node in self.read if self.is_written(node)]
        fused = set(self.read).difference(self._written)
        # What pointwise operators of the backward read and make: a chain may share that.
        self._read_fused = set[fx.Node]().union(*(cuts[node] for node in fused))
        self._read_behind = set[fx.Node]().union(*(cuts[node] - {node} for node in fused))
        self._made = set[fx.Node]().union(*(_between(cuts[node], node) for node in fused))
        self.kept |= self._read_fused
        self.kept.update(node for node in self._written if not self.is_cheap(node))

    def masks(self) -> list[Chain]:
        """The dropout masks that the backward can draw again from their seeds."""
        if not self._draws_again or repeats_random_operators():
            return []
        masks = filter(self._is_mask, self.kept.difference(self._packed))
        return [self._mask(node) for node in sorted(masks, key=self._order.__getitem__)]

    def packed(self) -> list[Chain]:
        """The dropout masks that the forward can save as bits."""
        found = sorted(filter(self._may_pack, self.kept), key=self._order.__getitem__)
        return [self._bits(node) for node in found]

    def tensors(self) -> list[Chain]:
        """The operands of products that the backward can recompute from saved tensors."""
        cuts = self._cuts()
        chains = (self._chain(node, cuts) for node in self._written if node not in self.kept)
        return [chain for chain in chains if chain is not None]

    def gain(self, chain: Chain) -> int:
        """How many bytes fewer are saved if the chain is recomputed [B]."""
        return chain.size - sum(self.bytes_of(s) for s in chain.sources if s not in self.kept)

    def take(self, chain: Chain) -> None:
        """Count a chain as recomputed, and its sources as saved."""
        self.fewer_bytes += self.gain(chain)
        self.again.update(chain.nodes)
        if chain.kind == "packed":
            self._packed.add(chain.made)
        elif chain.kind == "drawn":
            self.kept.remove(chain.made)
            self._redrawn.add(chain.made)
        self.kept |= chain.sources

    def elements_of(self, node: fx.Node) -> int:
        """The number of a tensor's elements; 0 if the node holds none."""
        return 0 if example_of(node) is None else self.hint(numel(shape_of(node)))

    def bytes_of(self, node: fx.Node) -> int:
        """The size of a tensor [B]; 0 if the node holds none."""
        val = example_of(node)
        return 0 if val is None else self.elements_of(node) * val.itemsize

    def runs_backward(self, node: fx.Node) -> bool:
        """True if the backward runs a node."""
        return node.op == "call_function" and self._phases.runs_backward(node)

    def is_written(self, node: fx.Node) -> bool:
        """True if an operator of the backward, such as a product, reads a tensor from memory."""
        return any(self.runs_backward(r) and not _is_fused(r) for r in readers_of(node))

    def _cuts(self) -> dict[fx.Node, frozenset[fx.Node]]:
        """By node, the smallest tensors from which pointwise operators compute it."""
        cuts: dict[fx.Node, frozenset[fx.Node]] = {}
        for node in self.forward:
            cuts[node] = frozenset([node])
            if node in self._redrawn:
                cuts[node] = frozenset()
            elif node not in self.kept and self.is_cheap(node):
                below = _below(node, cuts)
                # Of equal sizes the earlier tensor is taken: more may be computed from it.
                if self._size(below) <= self.bytes_of(node):
                    cuts[node] = below
        return cuts

    def _size(self, sources: frozenset[fx.Node]) -> float:
        """The bytes that must be saved in addition, to have some sources [B]."""
        if len(sources) > _MOST_SOURCES:
            return inf
        return sum(self.bytes_of(s) for s in sources if s not in self.kept)

    def may_run_again(self, node: fx.Node) -> bool:
        """True if the user has not tagged an operator, and a second run would compute the same."""
        target = node.target
        if not isinstance(target, torch._ops.OpOverload) or node.meta.get("recompute") is not None:
            return False
        acts = self._effects.is_random(node) or self._effects.writes(node)
        return not (acts or self._effects.is_overwritten(node))

    def is_cheap(self, node: fx.Node) -> bool:
        """True if an operator costs no more than moving its bytes, and may run again."""
        target = node.target
        is_fast = is_pointwise(target) or target in CASTS or target in VIEWS
        return is_fast and self.may_run_again(node)

    def is_packed(self, node: fx.Node) -> bool:
        """True if a node is a mask that is saved as bits."""
        return node in self._packed

    def _is_mask(self, node: fx.Node) -> bool:
        """True if a node compares random numbers with a constant, as dropout does."""
        given = node.all_input_nodes
        if len(given) != 1 or given[0].target not in _RANDOM or not self.is_cheap(node):
            return False
        return given[0].meta.get("recompute") is None

    def _may_pack(self, node: fx.Node) -> bool:
        is_free = node not in self._packed and node not in self._read_behind
        return is_free and self._is_mask(node) and packed_dim(node) is not None

    def _bits(self, node: fx.Node) -> Chain:
        # The mask is written and read as before, but in the forward. Its bits are written and read
        # besides. Packing and unpacking convert each element.
        size, elements = self.bytes_of(node), self.elements_of(node)
        cost = Cost({"elementwise": size / 4, "special": elements, "launches": 1})
        return Chain(node, (), frozenset(), size - size // 8, cost, "packed")

    def _mask(self, node: fx.Node) -> Chain:
        # Inductor draws it inside the kernel that uses it, so it is neither written nor read.
        size, elements = self.bytes_of(node), self.elements_of(node)
        cost = Cost({"random": elements, "elementwise": -2 * size})
        nodes = (node.all_input_nodes[0], node)
        return Chain(node, nodes, frozenset(), size, cost, "drawn")

    def _chain(self, node: fx.Node, cuts: dict[fx.Node, frozenset[fx.Node]]) -> Chain | None:
        """The chain of a tensor; None if recomputing it is not cheap."""
        sources = _below(node, cuts)
        if not self.is_cheap(node) or len(sources) > _MOST_SOURCES:
            return None
        nodes = _between(sources, node)
        if all(n.target in VIEWS for n in nodes):
            return None
        if any(n.meta.get("recompute") is not None for n in nodes):
            return None
        size = self.bytes_of(node)
        special = sum(self.elements_of(n) for n in nodes - self._made if n.target in SPECIAL)
        # A kernel that reads all of the sources anyway makes the tensor, too.
        is_alone = not sources <= self._read_fused
        cost = Cost(
            {
                "elementwise": size + sum(map(self.bytes_of, sources - self._read_fused)),
                "special": special,
                "random": sum(map(self.elements_of, nodes & self._redrawn)),
                "launches": int(is_alone),
            }
        )
        return Chain(node, tuple(sorted(nodes, key=self._order.__getitem__)), sources, size, cost)


def _below(node: fx.Node, cuts: dict[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The smallest tensors that a node's operands are computed from, without the graph's inputs."""
    below = (cuts.get(given, frozenset()) for given in node.all_input_nodes)
    return frozenset().union(*below)


def _between(sources: frozenset[fx.Node], made: fx.Node) -> set[fx.Node]:
    """The nodes that compute a tensor from some sources."""
    pending, nodes = [made], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node.op == "call_function" and node not in nodes and node not in sources:
            nodes.add(node)
            pending.extend(node.all_input_nodes)
    return nodes


def _is_fused(node: fx.Node) -> bool:
    """True if Inductor computes an operator in one kernel with its operands."""
    return is_pointwise(node.target) or node.target in _FUSED
