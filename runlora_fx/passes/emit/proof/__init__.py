"""Proofs: an old and a new root go in, and an error is raised if they differ.

Example: ``addmm(w, b, a), permute, mm`` is read back as ``X W' + X A' B'``. So was the old root.

``copies``, ``graph`` and ``apply`` import this folder. It imports ``nodes`` alone of ``emit``.

Invariant: nothing here changes the graph.
"""
