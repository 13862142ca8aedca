"""History: the latest report of this process, and the reports that are made inside a block.

A compilation makes one report for each of its graphs -> :func:`last_report` returns one report with
all of them.

Invariant: threads that compile at the same time do not mix their reports.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from runlora_fx.report.data import Report, combined

_lock = threading.Lock()
_last: Report | None = None
_open: list[list[Report]] = []


class _Thread(threading.local):
    """The reports of the compilation that runs in this thread; None if none runs."""

    pending: list[Report] | None = None


_thread = _Thread()


def record(report: Report) -> None:
    """Make a report the latest one, or a part of it inside :func:`as_one`."""
    global _last
    if _thread.pending is not None:
        _thread.pending.append(report)
        return
    with _lock:
        _last = report
        for collected in _open:
            collected.append(report)


def last_report() -> Report | None:
    """The report of the latest compilation or rewrite in this process; None if there was none."""
    return _last


@contextmanager
def as_one() -> Iterator[None]:
    """Join all reports that are made inside the block into one."""
    outer, parts = _thread.pending, list[Report]()
    _thread.pending = parts
    try:
        yield
    finally:
        _thread.pending = outer
        if parts:
            record(parts[0] if len(parts) == 1 else combined(parts))


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
            # Compared by identity, because two open lists may be equal.
            _open[:] = [other for other in _open if other is not collected]
