"""Algebra: matrix polynomials, the problems they pose and the plans that answer; no torch."""
