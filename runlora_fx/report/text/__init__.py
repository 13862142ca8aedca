"""Text: a report as plain text, and as a table for terminals.

    print(report), rich.print(report)

``summary.py`` writes what comes first, ``text.py`` the table and the formulas. ``formulas.py``
finds the lines that changed. ``console.py`` makes the table for terminals.

Invariant: the text says nothing beyond the data.
"""
