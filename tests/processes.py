"""Python in a process of its own, for what is read from the environment when torch is imported."""

import os
import re
import subprocess
import sys

#: A line of torch's own logs, such as "No CUDA runtime is found" where torch was built for CUDA.
_TORCH_LOG = re.compile(r"^[WI]\d{4} .*/torch/.*\.py:\d+\] .*\n", re.MULTILINE)


def python(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run Python, and return what it printed; its exit status is not checked."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def without_logs_of_torch(stderr: str) -> str:
    """What a process printed, without the lines that torch logs by itself."""
    return _TORCH_LOG.sub("", stderr)
