"""The pass: read a graph into algebra, search a plan, emit it, verify it."""
