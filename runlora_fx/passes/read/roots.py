"""Roots: the linear nodes that every plan must compute as tensors.

Example: in ``z = mm(relu(mm(x, w)), v)`` both products are roots: the activation reads the first,
the graph's output the second.

Invariant: a linear node that is no root is read by linear nodes only, through the cut that it was
computed with.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from runlora_fx.passes.read.linear import Linear


def find_roots(linear: Linear) -> list[fx.Node]:
    """The linear nodes that something outside the linear algebra needs, in graph order."""
    roots: set[fx.Node] = set()
    for node in reversed(tuple(linear.cuts)):
        users = linear.users_of(node)
        is_kept = len(users) > 1 and (_is_seen(linear, roots, users) or _grows(linear, node, users))
        if is_kept or not _is_interior(linear, node, users):
            roots.add(node)
    return [node for node in linear.cuts if node in roots]


def sums_below(linear: Linear, node: fx.Node, roots: set[fx.Node]) -> list[fx.Node]:
    """The nearest sums that a node is made of, that are no roots yet."""
    found: list[fx.Node] = []
    pending = list(linear.forms[node].sources)
    while pending:
        source = pending.pop()
        if source not in linear.cuts or source in roots or source in found:
            continue
        if linear.forms[source].adds:
            found.append(source)
        else:
            pending.extend(linear.forms[source].sources)
    return found


def _is_interior(linear: Linear, node: fx.Node, users: Sequence[fx.Node]) -> bool:
    """True if every user reads this node through the cut it was computed with."""
    for user in users:
        if user not in linear.cuts or not linear.forms[user].reads_as_computed(node, user, linear):
            return False
        # A diagonal of a product is no matrix, so it is a leaf of users that are no such vectors.
        if node in linear.vectors and user not in linear.vectors:
            return False
        # A sum in a wider dtype is a root if a user multiplies it in that dtype.
        if node in linear.widened and user not in linear.widened:
            return False
    return bool(users)


def _is_seen(linear: Linear, roots: set[fx.Node], users: Sequence[fx.Node]) -> bool:
    """True if some user is a root that is a view or a cast of the node.

    This tensor exists in memory already, so other users read it instead of computing it again.
    """
    return any([user in roots and linear.forms[user].is_view for user in users])


def _grows(linear: Linear, node: fx.Node, users: Sequence[fx.Node]) -> bool:
    """True if a sum is both multiplied and added to, as a residual stream without norms is.

    Its polynomial would grow from layer to layer, and so would that of every product with it.
    """
    if not linear.forms[node].adds:
        return False
    forms = map(linear.forms.get, users)
    is_added = any(form is not None and form.adds for form in forms)
    return is_added and _is_multiplied(linear, node)


def _is_multiplied(linear: Linear, node: fx.Node) -> bool:
    """True if a product takes a node, or another view of it."""
    for user in linear.users_of(node):
        form = linear.forms.get(user)
        if form is None:
            continue
        if form.is_view and _is_multiplied(linear, user):
            return True
        if any(node in product.sources for product in form.products):
            return True
    return False
