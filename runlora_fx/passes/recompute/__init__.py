"""Recompute: activations that the backward computes again instead of saving them.

    dA = z' norm(h), where h is saved anyway      ->      norm(h) is not saved

Goes in: a joint graph whose plans are written. Comes out: the chains of nodes to recompute, and
tags on random numbers that must be saved. ``passes/planning.py`` calls this room, and
``passes/emit/graph/recompute.py`` sets the tags.

Invariant: nothing here adds, moves or removes a node.
"""
