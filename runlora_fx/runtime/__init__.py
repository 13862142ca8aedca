"""Runtime: operators that compiled code calls.

Example: ``runlora.merged_weight(W, B, A, s)`` returns ``W + s B A``. It computes it again only
after a weight has changed.

Invariant: an operator returns what the torch operators that it replaces would return.
"""
