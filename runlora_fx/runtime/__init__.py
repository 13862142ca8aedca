"""Runtime: what compiled code calls while it runs."""
