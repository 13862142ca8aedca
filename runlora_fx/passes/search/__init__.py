"""Search: problems go in, decisions come out: a plan, or the reason to leave the graph alone.

    the problem of Y = X W' + 2 X A' B', 4096 tokens      ->      M = W + 2 B A; Y = X M'

It imports ``algebra`` and ``cost_model``. ``planning.py`` and ``tune`` call it.

Invariant: the decision depends on the problem and the objective alone: not on a clock, torch or a
graph.
"""
