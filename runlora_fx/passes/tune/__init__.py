"""Tune: prices from the machine, and plans timed on it.

Goes in: the problems of a graph and the decisions about them. Comes out: objectives that know
measured times, and decisions that were checked by running the best plans.
"""
