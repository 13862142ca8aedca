"""History: the latest report of this process, and the reports that are made inside a block.

A compilation makes one report for each of its graphs -> :func:`last_report` and :func:`report_of`
return one report with all of them.

Invariant: threads that compile at the same time do not mix their reports.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from runlora_fx._torch_compat import compile_call_of, compiled_for
from runlora_fx.report.data import Report, combined

_log = logging.getLogger("runlora_fx")

_lock = threading.Lock()
_last: Report | _Parts | None = None
_open: list[list[Report]] = []

#: Where the parts of a call of ``torch.compile`` are kept: they live as long as what it made.
_PARTS = "_runlora_parts"


class _Parts:
    """The reports of one call of ``torch.compile``: those of its graphs, in the order they came.

    A function that is compiled again, for other sizes or after a reset, replaces its reports.
    """

    def __init__(self) -> None:
        self._of: dict[Hashable, _Compilation] = {}

    def at(self, place: Hashable, compilation: object) -> _Compilation:
        """The reports of one compilation.

        Args:
            place: The code that is compiled.
            compilation: What stands for its compilation: one may have several graphs.
        """
        known = self._of.get(place)
        if known is None or known.of() is not compilation:
            known = self._of[place] = _Compilation(weakref.ref(compilation))
        return known

    def whole(self) -> Report:
        """One report of all graphs."""
        reports = [report for of in self._of.values() for report in of.all()]
        return reports[0] if len(reports) == 1 else combined(reports)


@dataclass
class _Compilation:
    """The reports of one compilation.

    Attributes:
        of: What stands for the compilation.
        made: The reports that were made so far.
        read: Reads the report of code from a cache; None if it was read, or if a pass has run.
    """

    of: weakref.ref[object]
    made: list[Report] = field(default_factory=list)
    read: Callable[[], Report] | None = None

    def add(self, report: Report) -> None:
        """Add a report that the compilation made."""
        self.made.append(report)
        self.read = None

    def all(self) -> list[Report]:
        """The reports that were made; if none was, that of the code from a cache."""
        if self.read is not None:
            self.made, self.read = [self.read()], None
        return self.made


class _Thread(threading.local):
    """The reports of the compilation that runs in this thread; None if none runs."""

    pending: list[Report] | None = None


_thread = _Thread()


def _compiling() -> tuple[object, Hashable, object] | None:
    """What Dynamo compiles in this thread; None also if torch cannot be asked."""
    try:
        return compiled_for()
    except Exception as error:  # the report is the latest one then, and nothing else is lost
        _log.info("runlora could not find what is compiled: %s: %s", type(error).__name__, error)
        return None


def record(report: Report) -> None:
    """Make a report the latest one, or a part of it inside :func:`as_one`."""
    global _last
    if _thread.pending is not None:
        _thread.pending.append(report)
        return
    found = _compiling()
    with _lock:
        _last = report
        if found is not None:
            _last = _parts_of(found[0])
            _last.at(*found[1:]).add(report)
        for collected in _open:
            collected.append(report)


def expect(read: Callable[[], Report]) -> None:
    """Have a report read if it is asked for and this compilation makes none.

    Inside :func:`as_one`, and where Dynamo compiles nothing, this does nothing.

    Args:
        read: Reads the report of code that comes from a cache.
    """
    global _last
    found = None if is_inside() else _compiling()
    if found is None:
        return
    with _lock:
        _last = _parts_of(found[0])
        _last.at(*found[1:]).read = read


def amend(change: Callable[[Report], Report]) -> None:
    """Replace what the compilation in this thread has reported so far; nothing if none runs.

    Args:
        change: Makes the new report, of the old one of all its graphs.
    """
    found = _compiling()
    if found is None:
        return
    with _lock:
        at = _parts_of(found[0]).at(*found[1:])
        made = [*at.made]
    if made:
        at.made = [change(made[0] if len(made) == 1 else combined(made))]


def _parts_of(call: object) -> _Parts:
    parts: _Parts = vars(call).setdefault(_PARTS, _Parts())
    return parts


def last_report() -> Report | None:
    """The report of the latest compilation or rewrite in this process; None if there was none.

    After graph breaks a compiled function has several graphs. The report is that of all of them.
    """
    with _lock:
        return _last.whole() if isinstance(_last, _Parts) else _last


def report_of(compiled: object) -> Report | None:
    """The report of a compiled module or function, with all its graphs.

    Args:
        compiled: What ``torch.compile`` returned, or a module whose method ``compile`` was called.

    Returns:
        The report; None if nothing was compiled for it yet. Nothing is compiled for it, either, if
        the same function was compiled before with the same backend and options.

    Raises:
        TypeError: If it was not compiled by ``torch.compile``.
    """
    call = compile_call_of(compiled)
    if call is None:
        raise TypeError(
            f"report_of() takes what torch.compile returned, or a module after module.compile(), "
            f"not {type(compiled).__name__}"
        )
    with _lock:
        parts = vars(call).get(_PARTS)
        return None if parts is None else parts.whole()


def is_inside() -> bool:
    """True inside :func:`as_one`."""
    return _thread.pending is not None


@contextmanager
def as_one() -> Iterator[list[Report]]:
    """Join all reports that are made inside the block into one.

    Yields:
        The reports that were made so far.
    """
    outer, parts = _thread.pending, list[Report]()
    _thread.pending = parts
    try:
        yield parts
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
