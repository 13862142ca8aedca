"""The reports of this process: the last one, and those made inside a block."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runlora_fx.report.data import Report

_lock = threading.Lock()
_last: Report | None = None
_open: list[list[Report]] = []


def record(report: Report) -> None:
    """Make a report the last one."""
    global _last
    with _lock:
        _last = report
        for collected in _open:
            collected.append(report)


def last_report() -> Report | None:
    """The report of the latest compilation or rewrite in this process; None if there was none."""
    return _last


@contextmanager
def collecting() -> Iterator[list[Report]]:
    """Collect the reports that are made inside the block."""
    collected: list[Report] = []
    with _lock:
        _open.append(collected)
    try:
        yield collected
    finally:
        with _lock:
            # By identity: two open lists may be equal.
            _open[:] = [other for other in _open if other is not collected]
