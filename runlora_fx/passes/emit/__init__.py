"""Emit: plans go in, proven nodes come out; the only room that changes a graph.

    Y = X M', M = W + 2 B A      ->      addmm(w, b, a, alpha=2), permute, mm

- ``nodes/`` writes single calls, with metadata and example values. It knows no plan.
- ``steps/`` writes the steps of plans. It imports ``nodes``.
- ``proof/`` reads back what was written, and compares numbers. It imports ``nodes``.
- ``copies/`` writes a root as a copy of an equal one. It imports ``steps`` and ``proof``.
- ``graph/`` changes whole graphs: transactions, tags, results. It imports ``nodes``, ``proof``.
- ``apply.py`` calls all of them. The planner calls it inside a transaction.

Invariant: a graph contains either all nodes that were proven for a region, or none of them.
"""
