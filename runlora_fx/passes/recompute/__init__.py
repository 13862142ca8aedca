"""Recompute: activations that the backward makes again instead of keeping them.

Goes in: a joint graph whose plans are written. Comes out: the same graph, with tags for the
partitioner. Imports from ``emit`` and below. ``passes/planning.py`` imports it.
"""
