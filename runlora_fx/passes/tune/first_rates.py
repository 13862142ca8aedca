"""First rates: what all plans depend on, measured once, when adapters are first compiled.

    torch.compile(model, backend="runlora")     on a device of which nothing is stored
    -> "runlora measured the rates of float32 on this machine in 2.1 s; ..."

Before Inductor computes its cache keys, a graph is looked at for a *bottleneck*: two products in a
row of which the first makes a narrower tensor than it reads, and the second a wider one. Only then
something is measured, and never twice for a dtype of a device. All ranks of a process group use the
numbers of the rank that comes first.

Invariant: no failure of a measurement reaches the caller.
"""

from __future__ import annotations

import json
import logging
import operator
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from runlora_fx._torch_group import agree_in_group, is_in_group
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices import machine
from runlora_fx.cost_model.devices.calibration import rates
from runlora_fx.cost_model.devices.measure import undisturbed
from runlora_fx.cost_model.devices.registry import entry_of
from runlora_fx.cost_model.profile import DTYPES
from runlora_fx.cost_model.store import Key, Record
from runlora_fx.options import Options

_log = logging.getLogger("runlora_fx")

#: The time for one dtype: on the host, and on an accelerator [s].
_HOST_S, _ACCELERATOR_S = 2.5, 1.0

#: Services that build and test set this; their times say little, and their plans should not vary.
_CI = "CI"

#: The most operators between the two products of an adapter: dropout, a scale, a cast.
_MOST_BETWEEN = 4

_PRODUCTS = {
    *(torch.nn.functional.linear, torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.einsum),
    *(operator.matmul, "matmul", "mm", "bmm", "__matmul__"),
}

#: Keys for which this process has measured, or failed to.
_done: set[Key] = set()


def measure_first_rates(gm: fx.GraphModule, options: Options) -> None:
    """Measure the rates that the plans of a graph depend on, unless they are known.

    Args:
        gm: A graph of Dynamo's.
        options: ``objective="flops"``, ``tune="off"`` and ``device`` need no rates.
    """
    if options.objective != "time" or options.tune == "off" or options.device:
        return
    if os.environ.get(_CI, "").lower() in ("1", "true", "yes"):
        return
    try:
        for device, dtype in dict.fromkeys(bottlenecks(gm.graph)):
            key = machine.key_of(device, dtype)
            if key not in _done:
                _done.add(key)
                _measure(device, dtype, key)
    except Exception as error:  # plans then use estimated rates
        _log.warning("runlora could not measure rates: %s: %s", type(error).__name__, error)


def _measure(device: torch.device, dtype: str, key: Key) -> None:
    """Measure one dtype, or take what another rank of the group has measured."""

    def measured() -> str:
        known = store.load(key).seconds_per
        if known:
            return json.dumps(dict(known))
        start = time.monotonic()
        budget = _HOST_S if entry_of(device).is_host else _ACCELERATOR_S
        with undisturbed(device):
            found = rates(device, dtype, budget)
        if found is None:
            _log.warning(
                "runlora could not measure the rates of %s: the machine is busy, or too slow for "
                "%g s. Plans use estimated rates. `python -m runlora_fx calibrate` measures longer",
                dtype,
                budget,
            )
            return "{}"
        store.add(key, Record(found))
        _log.info(
            "runlora measured the rates of %s on this machine in %.1f s, once; they are kept in "
            "%s. `python -m runlora_fx calibrate` measures them more closely",
            dtype,
            time.monotonic() - start,
            store.folder(),
        )
        return json.dumps(found)

    name = machine.name_in_group(device, dtype)
    found = json.loads(agree_in_group(f"rates/{name}", measured))
    # In a group all ranks have to use it; else the folder may be read-only.
    if found and (is_in_group() or store.load(key).seconds_per != found):
        machine.use(key, Record(found))


def bottlenecks(graph: fx.Graph) -> Iterable[tuple[torch.device, str]]:
    """The device and dtype of every first product of two whose result in between is narrow."""
    for node in graph.nodes:
        first = _tensor_of(node)
        if node.target not in _PRODUCTS or first is None or first.dim() < 2:
            continue
        operands = [t for t in map(_tensor_of, node.all_input_nodes) if t is not None]
        if not operands or not _is_number(first.shape[-1]):
            continue
        dtype = str(first.dtype).removeprefix("torch.")
        if dtype in DTYPES and (_is_merge(first, operands) or _leads_wider(node, operands[0])):
            yield first.device, dtype


def _is_merge(made: torch.Tensor, operands: list[torch.Tensor]) -> bool:
    """True for ``B A``: a matrix that is larger than both of its factors."""
    if made.dim() != 2 or len(operands) < 2 or any(t.dim() != 2 for t in operands):
        return False
    sizes = [*made.shape, *operands[-1].shape, *operands[-2].shape]
    if not all(map(_is_number, sizes)):
        return False
    return made.numel() > max(t.numel() for t in operands[-2:])


def _leads_wider(node: fx.Node, read: torch.Tensor) -> bool:
    """True if a product narrows what it reads, and a product of its result widens it again."""
    narrow, before = _tensor_of(node), read.shape[-1]
    assert narrow is not None
    rank = narrow.shape[-1]
    if not _is_number(before) or not rank < before:
        return False
    pending, seen = [node], 0
    while pending and seen <= _MOST_BETWEEN:
        seen += 1
        for user in pending.pop().users:
            made = _tensor_of(user)
            if made is None or made.dim() < 2:
                continue
            if user.target in _PRODUCTS:
                if _is_number(made.shape[-1]) and made.shape[-1] > rank:
                    return True
            elif made.shape == narrow.shape:
                pending.append(user)
    return False


def _tensor_of(node: fx.Node) -> torch.Tensor | None:
    """The example tensor of a node of Dynamo's graph."""
    val: Any = node.meta.get("example_value")
    return val if isinstance(val, torch.Tensor) else None


def _is_number(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, torch.SymInt)
