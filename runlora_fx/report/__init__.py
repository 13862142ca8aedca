"""Report: planned regions go in, sites, refusals and text come out.

    X W' + s (X A') B'      ->      "changed: 9.0% fewer FLOPs", with both plans as text

``data.py`` and ``sites.py`` are the public data, ``kinds.py`` gathers equal sites. The room
``describe`` makes sites of regions and decisions, ``figures`` makes the data of drawings and plots,
``text`` prints a report, ``html`` shows it as a page, ``stored`` writes and reads JSON.

Invariant: a report changes nothing. If making it fails, the rewritten graph is not affected.
"""
