"""Roots: the linear nodes that are materialised whatever a plan does.

Example: in ``z = mm(relu(mm(x, w)), v)`` both products are roots: the activation reads the first,
the graph's output the second.

Invariant: whatever is linear and no root is read by linear nodes alone, as it was computed.
"""

from __future__ import annotations

from torch import fx

from runlora_fx.passes.read.linear import Linear


def find_roots(linear: Linear) -> list[fx.Node]:
    """The linear nodes that something outside the linear algebra needs, in graph order."""
    roots: set[fx.Node] = set()
    for node in reversed(tuple(linear.cuts)):
        if not _is_interior(linear, node) or _is_seen(linear, roots, node) or _grows(linear, node):
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


def _is_interior(linear: Linear, node: fx.Node) -> bool:
    """True if every user reads this node through the cut it was computed with."""
    users = linear.users_of(node)
    return bool(users) and all(
        user in linear.cuts
        and linear.forms[user].reads_as_computed(node, user, linear)
        # No matrix is made of such a vector: whatever else reads it takes it as a leaf.
        and (node not in linear.vectors or user in linear.vectors)
        # What was added up in a wider dtype is multiplied in it.
        and (node not in linear.widened or user in linear.widened)
        for user in users
    )


def _is_seen(linear: Linear, roots: set[fx.Node], node: fx.Node) -> bool:
    """True if a root shows the node as it is, in another shape or dtype, and others use it.

    This tensor exists in memory already, so other users read it instead of computing it again.
    """
    users = linear.users_of(node)
    return len(users) > 1 and any(user in roots and linear.forms[user].is_view for user in users)


def _grows(linear: Linear, node: fx.Node) -> bool:
    """True if a sum is both multiplied and added to, as a residual stream without norms is.

    Its polynomial would grow from layer to layer, and so would that of every product with it.
    """
    users = linear.users_of(node)
    if not linear.forms[node].adds or len(users) < 2:
        return False
    forms = map(linear.forms.get, users)
    is_added = any(form is not None and form.adds for form in forms)
    return is_added and _is_multiplied(linear, node)


def _is_multiplied(linear: Linear, node: fx.Node) -> bool:
    """Whether a product takes a node, or another view of it."""
    for user in linear.users_of(node):
        form = linear.forms.get(user)
        if form is None:
            continue
        if form.is_view and _is_multiplied(linear, user):
            return True
        if any(node in product.sources for product in form.products):
            return True
    return False
