"""What the benchmarks that take times have in common: contenders, turns, comparison, tables."""
