"""Integrations: functions of other libraries, as Dynamo can trace them."""
