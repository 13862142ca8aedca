"""Steps of plans: a task goes in, the nodes that hold its roots come out, not yet proven.

Example: the step ``M = W + 2 B A`` -> ``addmm(W, B, A, alpha=2)``.

``copies`` and ``apply`` import this folder. It imports ``nodes`` alone of ``emit``.

Invariant: nothing here decides about the algebra. The plan says what to write.
"""
