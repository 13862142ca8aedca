"""Report: planned regions go in, sites, refusals and text come out.

    X W' + s (X A') B'      ->      "changed: 9.0% fewer FLOPs", with both plans as text

``data.py`` and ``sites.py`` are the public data, ``describe.py`` makes it of regions and decisions,
``notation.py`` and ``text.py`` print it, ``origin.py`` names the modules. ``drawing.py``,
``plotting.py`` and ``rates.py`` make the data of ``figures.py``, which the room ``html`` shows.

Invariant: a report changes nothing. If making it fails, the rewritten graph is not affected.
"""
