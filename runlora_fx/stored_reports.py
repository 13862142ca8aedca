"""Stored reports: what was decided about a graph, kept beside Inductor's cache of compiled code.

    first process: the pass runs, and its report is stored
    second process: the code comes from the cache, and the report is read back

The key is made of what decides the plan: the graph that Dynamo traced, its inputs, the pass with
its options and profile, and the settings of torch. Code with symbolic sizes serves more sizes than
it was compiled for, so its reports are stored with its guards. The files are JSON in Inductor's
cache folder, so they are deleted with the code.

Invariant: nothing here raises. A file that is damaged, from another version or not ours counts as
absent, and the report says so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import sympy
import torch
from torch import fx

from runlora_fx._torch_caches import (
    cache_folder,
    compiler_settings,
    guards_on,
    keeps_compiled_graphs,
)
from runlora_fx._torch_compat import fake_mode_of, size_hint
from runlora_fx._torch_names import FakeTensorMode
from runlora_fx.cost_model.store import drop_oldest, write_json
from runlora_fx.passes.levels.sizes import dim_of
from runlora_fx.report.data import Report
from runlora_fx.report.stored.read_back import UNREADABLE, expression, report_from

_log = logging.getLogger("runlora_fx")

_FORMAT = 2
_MAX_FILES = 512
_MAX_FILE_BYTES = 64 << 20

_RELATIONS: dict[str, Callable[[int, int], bool]] = {
    **{"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge},
    **{"==": operator.eq, "!=": operator.ne},
}

#: What a size that only the run knows counts as.
_UNKNOWN = -1


@dataclass(frozen=True)
class Key:
    """What the report of a graph is found by.

    Attributes:
        digest: What stands for the graph, its inputs, the pass and the settings of torch.
        sizes: The symbolic sizes of its inputs, and what they are in this call [elements].
        mode: The fake mode that has the guards on these sizes.
    """

    digest: str
    sizes: tuple[tuple[sympy.Symbol, int], ...] = ()
    mode: FakeTensorMode | None = None

    @property
    def file(self) -> str:
        """The name of the report's file."""
        if not self.sizes:
            return f"{self.digest}.json"
        return f"{self.digest}-{_digest([size for _, size in self.sizes])[:16]}.json"

    def guards(self) -> list[tuple[str, str]]:
        """The conditions under which the compiled code is valid, as :meth:`holds` takes them."""
        found = guards_on([symbol for symbol, _ in self.sizes], self.mode)
        return [(str(difference), relation) for difference, relation in found]

    def holds(self, difference: str, relation: str) -> bool:
        """True if a condition holds in this call, or if it cannot be read.

        Args:
            difference: A sum of products of sizes, such as ``"s0 - 77"``.
            relation: How it compares with 0, such as ``">="``.
        """
        known = {symbol.name: size for symbol, size in self.sizes if size != _UNKNOWN}
        found = expression(difference)
        value = found.subs(
            {symbol: known.get(symbol.name, symbol) for symbol in found.free_symbols}
        )
        return not value.is_Integer or _RELATIONS[relation](int(value), 0)


def key_of(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    identity: object,
    settings: Mapping[str, object],
) -> Key | None:
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
        traced = _traced(gm, example_inputs)
        facts = [list(_facts(*pair)) for pair in zip(example_inputs, traced, strict=True)]
        inputs = [list(map(str, of)) for of in facts]
        symbols = {
            s for of in facts for x in of if isinstance(x, sympy.Expr) for s in x.free_symbols
        }
        mode = fake_mode_of(traced)
        torchs = (torch.__version__, _state(), compiler_settings(), sorted(settings.items()))
        return Key(
            _digest((codes, inputs, torchs, identity)),
            tuple((s, size_hint(s, mode, _UNKNOWN)) for s in sorted(symbols, key=str)),
            mode,
        )
    except Exception as error:  # a report is missing then, and nothing else
        _log.debug("runlora could not identify a graph: %r", error)
        return None


def stored(key: Key | None, report: Report) -> Report:
    """Store a report; if that fails, a message is logged.

    Returns:
        The report. A report that is stored needs the causes and the break-evens of all its sites,
        which take searches. Their time is added to that of planning.
    """
    if key is None:
        return report
    try:
        report = _completed(report)
        path = _folder() / key.file
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {"format": _FORMAT, "key": key.digest, "guards": key.guards()}
        write_json(path, {**content, "report": json.loads(report.to_json())})
        drop_oldest(path.parent, "*.json", _MAX_FILES)
    except Exception as error:
        _log.info("runlora cannot store its report beside the compiled code: %r", error)
    return report


def _completed(report: Report) -> Report:
    """A report of which nothing is left to be computed, and which counts that as planning."""
    began = perf_counter()
    for site in report.sites:
        _ = site.causes, site.break_even  # they are kept once they are computed
    planning, took = report.planning_seconds, perf_counter() - began
    return report if planning is None else replace(report, planning_seconds=planning + took)


def read(key: Key | None) -> Report:
    """The report of code that came from a cache; one without sites, and with a note, if missing."""
    if key is None:
        return _missing("no report is stored for a graph that cannot be identified")
    try:
        return replace(report_from(_content(_folder() / key.file, key)["report"]), from_cache=True)
    except (FileNotFoundError, NotADirectoryError):
        return _of_other_sizes(key)
    except (OSError, *UNREADABLE) as error:
        _log.info("runlora ignores a stored report: %r", error)
        return _missing("the report that is stored with it cannot be read")


def _of_other_sizes(key: Key) -> Report:
    """The report that was made when the code was compiled for other sizes than those of a call."""
    fitting = []
    for path in sorted(_folder().glob(f"{key.digest}-*.json")) if key.sizes else ():
        try:
            content = _content(path, key)
            if all(key.holds(*guard) for guard in content["guards"]):
                fitting.append(report_from(content["report"]))
        except (OSError, *UNREADABLE) as error:
            _log.info("runlora ignores its file %s: %r", path, error)
    if len(fitting) == 1:
        return replace(fitting[0], from_cache=True, of_other_sizes=True)
    if fitting:
        return _missing(
            f"what was done is not known: it was compiled for other sizes, and "
            f"{len(fitting)} stored reports hold for these"
        )
    return _missing(
        "what was done is not known: no report is stored for this graph with these options and "
        "settings, or it was deleted"
    )


def _content(path: Path, key: Key) -> dict[str, Any]:
    """What a file holds.

    Raises:
        OSError: If it cannot be read.
        ValueError, TypeError, LookupError, AttributeError, RecursionError: If it is not ours.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError("larger than any file of ours")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content["format"] != _FORMAT or content["key"] != key.digest:
        raise ValueError("made by another version, or for another graph")
    return content


def _missing(why: str) -> Report:
    return Report(graph="cached", from_cache=True, note=why)


def _folder() -> Path:
    return cache_folder() / "runlora"


def _digest(of: object) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()


def _traced(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs as Dynamo traced them, with symbolic sizes; as they are where it is not known."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return [
        node.meta.get("example_value", x) for node, x in zip(inputs, example_inputs, strict=True)
    ]


def _facts(x: Any, traced: Any) -> Iterator[object]:
    """What a plan may depend on in an input.

    Args:
        x: The input.
        traced: The same as Dynamo traced it: sizes that compiled code is not made for are symbols.
    """
    yield type(x).__name__
    if isinstance(x, torch.Tensor):
        yield from (x.dtype, x.device, x.layout, x.requires_grad)
        sized = traced if isinstance(traced, torch.Tensor) else x
        yield from map(dim_of, (*sized.shape, *(sized.stride() if _is_strided(x) else ())))
    elif isinstance(x, torch.SymInt):
        yield dim_of(x)
    else:
        yield x


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
