"""Random programs, rewritten at every level and compared with what they compute eagerly.

``python -m tests.fuzz --cases 2000 --seed 0`` runs them; a failure is shrunk and printed as a
script that needs nothing of the tests. The same seed always makes the same programs.
"""
