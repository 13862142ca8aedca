"""Levels: which calls of a kind of graph are linear algebra, and which calls emission writes.

Example: ``aten.mm(x, w)`` of one level and ``torch.matmul(x, w)`` of another are one form.

Invariant: no room above names an operator to find out what it computes.
"""
