"""Tune: objectives with measured times, and decisions that are checked by timing plans.

    the best few plans of a region   ->   "changed: 12.4% less time measured (810 us -> 710 us)"

Goes in: the problems of a graph and the decisions about them. Comes out: an objective for every
dtype, and decisions that were made by running the best plans. ``planning.py`` calls it.

Invariant: a trial or measurement that fails leaves the predicted decision.
"""
