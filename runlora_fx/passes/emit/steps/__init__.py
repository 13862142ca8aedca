"""Steps of plans: a task goes in, nodes that compute its roots come out, not yet proven.

Example: the step ``M = W + 2 B A`` -> ``addmm(w, b, a, alpha=2)``.

``copies`` and ``apply`` import this folder. It imports ``nodes`` alone of ``emit``.

Invariant: nothing here changes the algebra. The plan says which steps to write.
"""
