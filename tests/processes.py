"""Python in a process of its own, for what is read from the environment when torch is imported."""

import os
import subprocess
import sys


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run Python, and return what it printed; its exit status is not checked."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )
