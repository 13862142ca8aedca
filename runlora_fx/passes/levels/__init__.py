"""Levels: which calls of a kind of graph are linear algebra, and which calls emission writes.

Example: ``aten.mm(x, w)`` of one level and ``torch.matmul(x, w)`` of another are one form.

Goes in: a node. Comes out: its form (``forms/``), or None. ``operators.py`` groups the ATen
operators that other rooms ask about.

Invariant: what a node computes is decided here alone. Other rooms read its form.
"""
