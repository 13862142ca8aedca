"""Algebra: matrix polynomials, problems and plans, as data that all rooms of the pass share.

    (A B)' C + (D + D) C      ->      the polynomial B' A' C + 2 D C

Goes in: leaf numbers. Comes out: polynomials of leaves (``polynomials.py``, ``words.py``), problems
that are posed in them (``problem.py``), and plans with their steps, implementations and costs.
It imports ``cost_model`` alone.

Invariant: nothing here imports torch or knows a graph.
"""
