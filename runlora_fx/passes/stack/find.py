"""The search for stacks: which products become one, by price.

    four products of x, of 8 MB, by merged weights and an A      ->      one stack, without copies

All stacks are found before any is written. Sums come first: they save the most.

Invariant: every stack that is found is predicted to take less time than what it replaces.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, TypeAlias

from torch import fx

from runlora_fx.cost_model.cost import Cost
from runlora_fx.passes.levels.sizes import shape_of
from runlora_fx.passes.stack.matrices import Matrix, base_of, is_matrix, is_sum, length_of
from runlora_fx.passes.stack.products import Product, Products, may_be_joined

#: A buffer that holds at most this share of other numbers is kept instead of copies of its parts.
_WASTE = 0.03

#: The time that a cost takes [s].
Price: TypeAlias = Callable[[Cost], float]

#: Where the operand that products share stands.
Side: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True)
class Joined:
    """Matrices side by side in one buffer.

    Attributes:
        parts: The matrices. All lie alike in memory.
        dim: Where they follow each other: 0 below each other, 1 side by side.
        in_place: By part, True if it is computed where it lies.
        is_gradient: True if the backward needs the buffer.
        within: The buffer that they follow each other in already, if they do.
    """

    parts: tuple[Matrix, ...]
    dim: int
    in_place: tuple[bool, ...]
    is_gradient: bool
    within: Joined | None = None


@dataclass(frozen=True)
class Shared:
    """Products that share an operand.

    Attributes:
        products: The products, in the order of their other operands.
        side: Where the operand that they share stands.
        others: The other operands, joined.
        turned: True if the transpose of what is joined is multiplied.
        copied: By product, True if its result is copied out of the common one.
        saved: The time that the stack is predicted to save [s].
    """

    products: tuple[Product, ...]
    side: Side
    others: Joined
    turned: bool
    copied: tuple[bool, ...]
    saved: float


@dataclass(frozen=True)
class Added:
    """Products that are added up.

    Attributes:
        root: The last addition.
        products: The products that become one.
        rest: What else is added.
        lefts: Their left operands, joined; and True if the transpose of that is multiplied.
        rights: The same of their right operands.
        saved: The time that the stack is predicted to save [s].
    """

    root: fx.Node
    products: tuple[Product, ...]
    rest: tuple[fx.Node, ...]
    lefts: tuple[Joined, bool]
    rights: tuple[Joined, bool]
    saved: float


class Finder:
    """Finds the stacks of a graph."""

    def __init__(self, products: Products, price: Price) -> None:
        """Look at some products, by a price."""
        self._products = products
        self._price = price
        self._of = {product.node: product for product in products.all}
        self._claimed: dict[tuple[fx.Node, bool], Joined] = {}
        self._used: set[fx.Node] = set()

    def found(self) -> list[Shared | Added]:
        """All stacks, in the order in which they are to be written."""
        sums = [added for root in self._roots() if (added := self._added(root)) is not None]
        shared = [stack for group in self._groups() for stack in self._shared(*group)]
        return [*sums, *shared]

    # -- sums ----------------------------------------------------------------------------------

    def _roots(self) -> list[fx.Node]:
        """The last additions of sums."""
        found: dict[fx.Node, None] = {}
        for product in self._products.all:
            node = product.node
            while len(node.users) == 1 and _is_addition(user := next(iter(node.users))):
                node = user
            if node is not product.node and is_matrix(node):
                found[node] = None
        return list(found)

    def _added(self, root: fx.Node) -> Added | None:
        """The products of a sum that become one; None if none should."""
        addends = list(_addends(root))
        products = [self._of[node] for node in addends if node in self._of]
        products = [p for p in products if len(p.node.users) == 1]
        if len(products) < 2 or not self._products.are_alike(products):
            return None
        saved = self._price(
            Cost({"read": products[0].size, "written": products[0].size, "launches": 1})
        )
        copies = {
            p.node: self._copying(p.left, _dim_of(p.left, 1), p)
            + self._copying(p.right, _dim_of(p.right, 0), p)
            for p in products
        }
        # The cheapest of each orientation are taken while they cost less than they save.
        lead = min(products, key=lambda p: copies[p.node])
        dims = (_dim_of(lead.left, 1), _dim_of(lead.right, 0))
        chosen = [
            p
            for p in products
            if (_dim_of(p.left, 1), _dim_of(p.right, 0)) == dims
            and may_be_joined(p.left.node, dims[0])
            and may_be_joined(p.right.node, dims[1])
        ]
        chosen = [p for p in chosen if p is lead or copies[p.node] < saved]
        gain = (len(chosen) - 1) * saved - sum(copies[p.node] for p in chosen)
        if len(chosen) < 2 or gain <= 0:
            return None
        lefts = self._joined([p.left for p in chosen], dims[0], root)
        rights = self._joined([p.right for p in chosen], dims[1], root)
        if lefts is None or rights is None:
            return None
        taken = {p.node for p in chosen}
        self._used |= taken
        return Added(
            root,
            tuple(chosen),
            tuple(node for node in addends if node not in taken),
            (lefts, chosen[0].left.turned),
            (rights, chosen[0].right.turned),
            gain,
        )

    # -- a shared operand ----------------------------------------------------------------------

    def _groups(self) -> Iterator[tuple[Side, list[Product]]]:
        """The products that share an operand, those of the largest operands first."""
        found: dict[tuple[Side, Hashable, bool], list[Product]] = {}
        for product in self._products.all:
            if self._is_free(product):
                grad = product.is_gradient
                found.setdefault(("left", product.left.key, grad), []).append(product)
                found.setdefault(("right", product.right.key, grad), []).append(product)
        sized = (
            (_operand(side, group[0]).size, side, group) for (side, *_), group in found.items()
        )
        for _, side, group in sorted(sized, key=lambda item: -item[0]):
            yield side, group

    def _shared(self, side: Side, group: list[Product]) -> Iterator[Shared]:
        """The stacks of products that share an operand."""
        for find in (self._joined_before, self._best):
            while True:
                group = [product for product in group if self._is_free(product)]
                stack = find(side, group) if len(group) > 1 else None
                if stack is None:
                    break
                yield stack
                self._used |= {product.node for product in stack.products}

    def _is_free(self, product: Product) -> bool:
        """True if a product may become a part of another: its result has no place in a buffer."""
        is_claimed = (product.node, product.is_gradient) in self._claimed
        return product.node not in self._used and not is_claimed

    def _joined_before(self, side: Side, group: list[Product]) -> Shared | None:
        """The stack of products whose other operands follow each other in a buffer."""
        if not self._products.are_alike(group):
            return None
        for product in group:
            other = _other(side, product)
            buffer = self._claimed.get((other.node, product.is_gradient))
            if buffer is None or buffer.dim != _dim_of(other, 1 if side == "left" else 0):
                continue
            nodes = [part.node for part in buffer.parts]
            by_operand = {
                _other(side, p).node: p for p in group if _other(side, p).turned == other.turned
            }
            run = takewhile(by_operand.__contains__, nodes[nodes.index(other.node) :])
            chosen = [by_operand[node] for node in run]
            if len(chosen) < 2:
                continue
            copied = [self._is_copied(side, p, chosen, keeps=False) for p in chosen]
            made, others = [p.node for p in chosen], tuple(_other(side, p) for p in chosen)
            if any(copied) or self._read_each_other(made, others):
                continue
            where = Joined(others, buffer.dim, (), buffer.is_gradient, within=buffer)
            gain = (len(chosen) - 1) * self._reading(side, product)
            return Shared(tuple(chosen), side, where, other.turned, tuple(copied), gain)
        return None

    def _best(self, side: Side, group: list[Product]) -> Shared | None:
        """The stack that saves the most; None if none saves anything."""
        if not self._products.are_alike(group):
            return None
        lead = max(group, key=lambda p: _other(side, p).size)
        outer = 1 if side == "left" else 0
        dim, turned = _dim_of(_other(side, lead), outer), _other(side, lead).turned
        fitting = [
            p
            for p in group
            if (_dim_of(_other(side, p), outer), _other(side, p).turned) == (dim, turned)
            and may_be_joined(_other(side, p).node, dim)
            and (side == "right" or may_be_joined(p.node, 1))
        ]
        if len(fitting) < 2:
            return None
        saved = self._reading(side, lead)
        best, most = None, 0.0
        for keeps in (True, False):
            copied = {p.node: self._is_copied(side, p, fitting, keeps=keeps) for p in fitting}
            costs = {
                p.node: self._copying(_other(side, p), dim, p)
                + (self._copy(p.size) if copied[p.node] else 0.0)
                for p in fitting
            }
            cheapest = min(fitting, key=lambda p: costs[p.node])
            chosen = [p for p in fitting if p is cheapest or costs[p.node] < saved]
            gain = (len(chosen) - 1) * saved - sum(costs[p.node] for p in chosen)
            if keeps and not self._wastes_little(chosen):
                continue
            if len(chosen) > 1 and gain > most:
                best, most = (chosen, copied), gain
        if best is None:
            return None
        chosen, copied = best
        nodes = [p.node for p in chosen]
        others = [_other(side, p) for p in chosen]
        if self._read_each_other(nodes, others):
            return None
        joined = self._joined(others, dim, chosen[0].node)
        if joined is None:
            return None
        return Shared(tuple(chosen), side, joined, turned, tuple(copied[n] for n in nodes), most)

    def _reading(self, side: Side, product: Product) -> float:
        """The time that a product takes to start, and to read the operand that others share [s]."""
        return self._price(Cost({"read": _operand(side, product).size, "launches": 1}))

    def _read_each_other(self, products: Sequence[fx.Node], others: Sequence[Matrix]) -> bool:
        """True if a product is an operand of another, or an operand is computed of a product."""
        operands = [matrix.node for matrix in others]
        is_read = any(base_of(node) in products for node in operands)
        return is_read or self._products.depends(products, operands)

    def _is_copied(
        self, side: Side, product: Product, group: Sequence[Product], *, keeps: bool
    ) -> bool:
        """True if a result is copied out of the common one."""
        node = product.node
        if not keeps and self._products.is_kept(node):
            return True
        if side == "right":  # its rows follow each other: they lie as before
            return not self._products.may_be_strided(node, (shape_of(node)[1], 1))
        width = sum(length_of(p.node, 1) for p in group)
        return not self._products.may_be_strided(node, (width, 1))

    def _wastes_little(self, products: Sequence[Product]) -> bool:
        """True if the backward needs nearly all of some results, or nothing of them."""
        kept = [p.size for p in products if self._products.is_kept(p.node)]
        return not kept or sum(kept) >= (1 - _WASTE) * sum(p.size for p in products)

    # -- operands ------------------------------------------------------------------------------

    def _copy(self, size: int) -> float:
        """The time to copy some bytes [s]."""
        return self._price(Cost({"elementwise": 2 * size, "launches": 1}))

    def _copying(self, matrix: Matrix, dim: int, product: Product) -> float:
        """The time that a matrix takes to get into a buffer with others [s]."""
        is_gradient = product.is_gradient
        if self._is_in_place(matrix, dim, is_gradient=is_gradient):
            return 0.0
        if self._products.is_pointwise(matrix, is_gradient=is_gradient):
            return self._price(Cost({"elementwise": matrix.size}))
        return self._copy(matrix.size)

    def _is_in_place(self, matrix: Matrix, dim: int, *, is_gradient: bool) -> bool:
        """True if a matrix needs no copy to lie in a buffer with others."""
        # It lies in another buffer, as what was joined there or as a part of a larger product.
        if (matrix.node, is_gradient) in self._claimed or matrix.node in self._used:
            return False
        cols = shape_of(matrix.node)[1]
        if dim == 1 and not self._products.may_be_strided(matrix.node, (2 * cols, 1)):
            return False
        return self._products.is_written_in_place(matrix, is_gradient=is_gradient)

    def _joined(self, parts: Sequence[Matrix], dim: int, reader: fx.Node) -> Joined | None:
        """Some matrices as one; None if one is made of another that is read there from now on."""
        nodes = [part.node for part in parts]
        is_gradient = self._products.is_gradient(reader)
        in_place = tuple(self._is_in_place(part, dim, is_gradient=is_gradient) for part in parts)
        placed = [node for node, own in zip(nodes, in_place, strict=True) if own]
        if len(set(nodes)) < len(nodes) or self._products.depends(placed, nodes):
            return None
        joined = Joined(tuple(parts), dim, in_place, is_gradient)
        self._claimed.update(
            {(p.node, is_gradient): joined for p, own in zip(parts, in_place, strict=True) if own}
        )
        return joined


def _operand(side: Side, product: Product) -> Matrix:
    return product.left if side == "left" else product.right


def _other(side: Side, product: Product) -> Matrix:
    return product.right if side == "left" else product.left


def _dim_of(matrix: Matrix, dim: int) -> int:
    """The dimension of the node that is a dimension of the matrix."""
    return 1 - dim if matrix.turned else dim


def _is_addition(node: fx.Node) -> bool:
    """True if a node adds up two matrices that lie row by row, or the transposes of such."""
    return is_sum(node) and all(map(is_matrix, node.all_input_nodes))


def _addends(root: fx.Node) -> Iterator[fx.Node]:
    """What is added up, through additions that nothing else reads."""
    for addend in root.args:
        assert isinstance(addend, fx.Node)
        if _is_addition(addend) and len(addend.users) == 1:
            yield from _addends(addend)
        else:
            yield addend
