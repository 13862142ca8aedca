"""Single calls: an operator and its arguments go in, a node with metadata comes out.

Example: ``writer.matmul(x, a)`` -> ``mm(x, a)``, or the equal node that stands before it already.

All of ``emit`` imports this folder. It imports nothing of ``emit``.

Invariant: nothing here knows of plans or polynomials.
"""
