"""Recompute: activations that the backward computes again instead of saving them.

    dA = z' norm(h), where h is saved anyway      ->      norm(h) is not saved

Goes in: a joint graph whose plans are written. Comes out: tags on what is recomputed, masks that
are saved as bits, and tags on random numbers that must be saved. ``passes/planning.py`` calls this
room. ``passes/emit/graph/`` sets the tags and writes the bits.

Invariant: nothing here adds, moves or removes a node itself.
"""
