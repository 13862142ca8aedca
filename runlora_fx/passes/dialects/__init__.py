"""Dialects: how each graph level spells the forms, and how to write them back."""
