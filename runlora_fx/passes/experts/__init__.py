"""Experts: products with merged stacks of expert weights, taken from their factors instead."""
