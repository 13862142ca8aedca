"""The pass as a plug-in of Inductor: its reports are stored and read as those of the backend are.

    first process: Inductor asks for the pass's identity, and runs it    ->  the report is stored
    second process: Inductor asks for the identity and finds the code    ->  the report is read

Inductor asks for the identity before it looks for compiled code. That is all that it asks of a pass
if there is some. The report is read when somebody asks for it.

Invariant: nothing here raises, and nothing is done where the backend compiles.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial

from runlora_fx import history, stored_reports
from runlora_fx._torch_caches import compiling, runs_joint_passes

_log = logging.getLogger("runlora_fx")

#: Where the key of a compilation's report is kept, for as long as torch keeps the compilation.
_KEY = "_runlora_key"


def looked_for(identity: object) -> None:
    """Inductor is about to look for compiled code.

    Args:
        identity: What identifies the pass in Inductor's caches; None if nothing does.
    """
    if identity is None or history.is_inside():
        return
    try:
        now = compiling()
        if now is None or _KEY in now.notes or not runs_joint_passes():
            return
        key = now.notes[_KEY] = stored_reports.key_of(now.graph, now.inputs, identity, {})
        if key is not None:
            # Reading needs no guards, which would be kept in memory.
            history.expect(partial(stored_reports.read, replace(key, mode=None)))
    except Exception as error:
        _log.info("runlora could not look for its report: %r", error)


def ran() -> None:
    """The pass has run on a graph and recorded its report."""
    if history.is_inside():
        return
    try:
        now = compiling()
        key = None if now is None else now.notes.get(_KEY)
        if key is not None:
            history.amend(partial(stored_reports.stored, key))
    except Exception as error:
        _log.info("runlora could not store its report: %r", error)
