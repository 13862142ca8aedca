"""Proofs: an old and a new root go in, and an error comes out if they differ.

Example: ``addmm(w, b, a), permute, mm`` is read back as ``X W' + X A' B'``, as the old root was.

``copies`` and ``apply`` import this folder. It imports ``nodes`` alone of ``emit``.

Invariant: nothing here changes the graph.
"""
