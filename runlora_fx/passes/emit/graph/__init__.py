"""Whole graphs: what must hold for a graph as a whole when its roots are replaced.

Examples: two results stay two tensors, a failure leaves the graph as it came, and the backward
recomputes a merged weight instead of saving it.

``apply`` and the passes import this folder. It imports ``nodes`` and ``proof`` of ``emit``.

Invariant: nothing here changes the numbers of a result.
"""
