"""Doctor: `runlora doctor` says what is installed and set, what is wrong with it, and what to do.

``finding.py`` has the result of one check, ``command.py`` runs all checks and prints them. Every
other file checks one subject.

Invariant: a check changes nothing. One that fails itself is a problem in the list, not a crash.
"""
