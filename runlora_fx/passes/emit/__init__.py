"""Emit: plans go in, proven nodes come out; the only room that changes a graph."""
