"""Runtime: operators that compiled code calls."""
