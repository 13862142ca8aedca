"""Integrations: substitutes for functions of other libraries that Dynamo cannot trace."""
