"""Stored: reports as JSON, for programs and for files beside compiled code.

    report    ->    {"schema": 1, ...}    ->    an equal report

``as_json.py`` writes, ``read_back.py`` reads.

Invariant: nothing of a file is evaluated.
"""
