"""Stored reports: what was decided about a graph, kept beside Inductor's cache of compiled code.

    first process: the pass runs, and its report is stored
    second process: the code comes from the cache, and the report is read back

The key is made of what decides the plan: the graph that Dynamo traced, its inputs, the pass with
its options and profile, and the settings of torch. The files are JSON in Inductor's cache folder,
so they are deleted with the code.

Invariant: nothing here raises. A file that is damaged, from another version or not ours counts as
absent, and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import fx

from runlora_fx._torch_compat import (
    cache_folder,
    compiler_settings,
    fake_mode_of,
    keeps_compiled_graphs,
    size_hint,
)
from runlora_fx.cost_model.store import drop_oldest, write_json
from runlora_fx.passes.levels.sizes import dim_of
from runlora_fx.report.data import Report
from runlora_fx.report.read_back import UNREADABLE, report_from

_log = logging.getLogger("runlora_fx")

_FORMAT = 1
_MAX_FILES = 512
_MAX_FILE_BYTES = 64 << 20

#: What a size that only the run knows counts as.
_UNKNOWN = -1


def key_of(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    identity: object,
    settings: Mapping[str, object],
) -> str | None:
    """The key of a graph's report; None if its compiled code goes to no cache.

    Args:
        gm: The graph that Dynamo traced.
        example_inputs: Its example inputs.
        identity: What identifies the pass in Inductor's caches; None if nothing does.
        settings: The settings of Inductor that were given for this compilation.
    """
    if identity is None or not keeps_compiled_graphs():
        return None
    try:
        codes = [m.code for m in gm.modules() if isinstance(m, fx.GraphModule)]
        mode = fake_mode_of(example_inputs)
        inputs = [list(map(str, _facts(x, mode))) for x in example_inputs]
        torchs = (torch.__version__, _state(), compiler_settings(), sorted(settings.items()))
        return hashlib.sha256(repr((codes, inputs, torchs, identity)).encode()).hexdigest()
    except Exception as error:  # a report is missing then, and nothing else
        _log.debug("runlora could not identify a graph: %r", error)
        return None


def write(key: str | None, report: Report) -> None:
    """Store a report; if that fails, a message is logged."""
    if key is None:
        return
    try:
        path = _path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"format": _FORMAT, "key": key, "report": json.loads(report.to_json())})
        drop_oldest(path.parent, "*.json", _MAX_FILES)
    except Exception as error:
        _log.info("runlora cannot store its report beside the compiled code: %r", error)


def read(key: str | None) -> Report:
    """The report of code that came from a cache; one without sites, and with a note, if missing."""
    if key is None:
        return _missing("no report is stored for a graph that cannot be identified")
    path = _path(key)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError("larger than any file of ours")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT or content["key"] != key:
            raise ValueError("made by another version, or for another graph")
        return replace(report_from(content["report"]), from_cache=True)
    except (FileNotFoundError, NotADirectoryError):
        return _missing(
            "no report is stored for this graph with these sizes, options and settings: the code "
            "was compiled for other sizes, or its report was deleted"
        )
    except (OSError, *UNREADABLE) as error:
        _log.info("runlora ignores its file %s: %r", path, error)
        return _missing("the report that is stored with it cannot be read")


def _missing(why: str) -> Report:
    return Report(graph="cached", from_cache=True, note=why)


def _path(key: str) -> Path:
    return cache_folder() / "runlora" / f"{key}.json"


def _facts(x: Any, mode: Any) -> Iterator[object]:
    """What a plan may depend on in an input."""
    yield type(x).__name__
    if isinstance(x, torch.Tensor):
        yield from (x.dtype, x.device, x.layout, x.requires_grad)
        sizes = [dim_of(size) for size in (*x.shape, *(x.stride() if _is_strided(x) else ()))]
    elif isinstance(x, torch.SymInt):
        sizes = [dim_of(x)]
    else:
        yield x
        return
    for size in sizes:
        yield size
        yield size if isinstance(size, int) else size_hint(size, mode, _UNKNOWN)


def _is_strided(x: torch.Tensor) -> bool:
    return x.layout == torch.strided


def _state() -> tuple[object, ...]:
    """The state of torch that changes the graphs that AOTAutograd makes."""
    autocasts = [
        (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return (
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocasts),
        torch.are_deterministic_algorithms_enabled(),
    )
