"""Read: a graph goes in, and problems to plan come out.

Example: ``linear(x, w) + 2 * linear(linear(x, a), b)`` is a region of one root, which is the
polynomial ``X W' + 2 X A' B'``.

Invariant: reading changes nothing in the graph.
"""
