"""Levels: how each kind of graph (ATen, torch functions) spells linear algebra, and writes it."""
