"""Copies: the second of two equal roots is written as a copy of the nodes of the first.

Example: layer 0 is emitted step by step and proven. Layer 1 gets the same nodes on its own leaves.

``apply`` imports this folder. It imports ``steps``, ``proof`` and ``nodes``.

Invariant: a copy has the nodes that emitting the root step by step would write.
"""
