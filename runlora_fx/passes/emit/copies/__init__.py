"""Copies: two equal roots go in, and the second is written as a copy of the first.

Example: layer 0 is emitted step by step and proven. Layer 1 gets the same nodes on its own leaves.

``apply`` imports this folder. It imports ``steps``, ``proof`` and ``nodes``.

Invariant: a copy is what would be written step by step.
"""
