"""Read: a graph goes in, regions of matrix polynomials come out; nothing is changed."""
