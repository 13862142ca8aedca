"""Figures: the data of drawings and plots, for the page to show.

    a plan    ->    boxes and edges, and what it takes by the number of tokens

``figures.py`` has the data, ``drawing.py`` makes that of drawings, ``plotting.py`` that of plots,
``rates.py`` that of rooflines.

Invariant: nothing here knows what a figure looks like.
"""
