"""Whole graphs: a graph whose roots are replaced goes in, and keeps its promises to its callers.

Examples: two results still lie in memory of their own, a failure leaves the graph as it came, and
the backward recomputes a merged weight instead of keeping it.

``apply`` and the passes import this folder. It imports ``nodes`` alone of ``emit``.

Invariant: no result of the graph has other numbers afterwards.
"""
