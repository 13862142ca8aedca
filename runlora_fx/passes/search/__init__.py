"""Search: problems go in, decisions come out; it knows nothing of torch or of graphs."""
