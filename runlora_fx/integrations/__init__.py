"""Integrations: substitutes for functions of other libraries that Dynamo cannot trace.

Example: PEFT's DoRA breaks the graph three times a layer. With its substitute a layer is one graph.

Invariant: substitutes act only in compilations for our backends, and compute the same.
"""
