"""The report as a web page: one file without anything from elsewhere.

    report.to_html()    ->    "<!doctype html> ..."

``page.py`` fills the templates. ``kinds.py`` gathers equal sites, ``layered.py`` and ``sketch.py``
place the boxes of a drawing, ``axes.py`` and ``plots.py`` the curves of a plot, ``numbers.py``
writes numbers with their units.

Invariant: Python computes positions and texts. What they look like is in ``templates/``.
"""
