"""Mistakes that emission could make, each made at every place, and all to be caught.

``python -m tests.mutations`` makes them, and prints the table of docs/reliability.md.
"""
