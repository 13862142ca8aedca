"""Describing: a region and its decision become a site.

    X W' + s (X A') B'    ->    Site(("q_proj",), "N=1024, ...", "Y = X (W' + s A' B')", ...)

``describe.py`` makes sites, ``notation.py`` writes formulas, ``origin.py`` names modules.
``base.py`` finds base products. ``causes.py`` and ``price_causes.py`` say why a site was left
alone.

Invariant: describing changes no graph.
"""
