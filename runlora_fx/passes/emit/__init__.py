"""Emit: plans go in, proven nodes come out; the only room that changes a graph.

- ``nodes/`` writes single calls, with metadata and example values. It knows no plan.
- ``steps/`` writes the steps of plans. It imports ``nodes``.
- ``proof/`` reads back what was written, and compares numbers. It imports ``nodes``.
- ``copies/`` writes a root as a copy of an equal one. It imports ``steps`` and ``proof``.
- ``graph/`` keeps what holds of the graph as a whole. It imports ``nodes``.
- ``apply.py`` puts them together. The planner calls it, inside a transaction.

Invariant: a graph holds either all nodes that were proven for a region, or none.
"""
