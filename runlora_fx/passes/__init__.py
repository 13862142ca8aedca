"""The pass: a graph and options go in, the rewritten graph and a report come out.

    x W' + 2 (x A') B'      ->      x (W + 2 B A)', if the search finds that it costs less

``levels`` and ``read`` turn a graph into problems, ``search`` finds plans, ``emit`` writes and
proves them, ``recompute`` and ``tune`` refine them. ``planning.py`` calls these rooms,
``pipeline.py`` adds the report. ``algebra`` has the data that all of them share.

Invariant: the rewritten graph computes what the incoming graph computed.
"""
