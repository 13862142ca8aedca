"""Console: results go to stdout, progress goes to stderr and only to a terminal.

    with status("Tracing ..."):          shown while it lasts, and nowhere in a pipe
        report = explain(model)
    results().print(table)               as wide as the terminal; never cut in a pipe

Invariant: a command whose output is piped writes nothing but results, and no line is cut.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

#: The width of what is piped: wider than any table [characters].
_PIPED = 10_000


def results() -> Console:
    """A console for results: stdout, with whole lines where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED)


@contextmanager
def quietly() -> Iterator[None]:
    """A context for imports of other libraries: what they log and warn of is not a result."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def status(doing: str) -> AbstractContextManager[object]:
    """A spinner with a text on stderr; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        return nullcontext()
    return Console(stderr=True).status(doing)


def progress() -> Progress:
    """A progress bar on stderr that vanishes at the end; nothing where stderr is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
