"""Packing: a mask that is saved as bits is computed from them again, bit by bit.

    pack(mask), unpack(bits)      ->      the same mask, on random bits of its shape and strides

The written calls are run. Where the first dimension is not the packed one, two of its rows are
enough: all rows are packed alike.

Invariant: nothing here changes the graph, or the state of the random generators.
"""

from __future__ import annotations

import logging
from math import prod
from typing import Any

import torch
from torch import fx

from runlora_fx._torch_compat import outside_all_modes
from runlora_fx.passes.emit.proof.verify import VerificationError

_log = logging.getLogger("runlora_fx")

#: The largest number of elements of a mask that is run [elements].
_MAX_ELEMENTS = 1 << 22

#: The largest first dimension that is run as it is, and the number of rows of larger ones. Views of
#: the values of bits have eight rows, and stay as they are.
_FEW, _ROWS = 8, 2

_SIZED = (torch.ops.aten.view.default, torch.ops.aten.as_strided.default)


def check_packing(mask: fx.Node, unpacked: fx.Node, dim: int) -> None:
    """Run what was written between a mask and the mask that is computed from its bits.

    Args:
        mask: The mask.
        unpacked: The same, from its bits.
        dim: The dimension along which it is packed.

    Raises:
        VerificationError: If the two differ.
    """
    val = mask.meta["val"]
    size = val.shape[0]
    first = _ROWS if dim > 0 and size > _FEW else size
    shape = (first, *val.shape[1:])
    if prod(shape) > _MAX_ELEMENTS:
        _log.info("runlora did not run the packing of %s: it is too large", mask.name)
        return
    generator = torch.Generator().manual_seed(0)
    with outside_all_modes(), torch.no_grad():
        bits = torch.empty_strided(shape, val.stride(), dtype=val.dtype)
        bits.copy_(torch.rand(shape, generator=generator) < 0.5)
        try:
            made = _run(unpacked, {mask: bits}, {size: first})
        except Exception as error:
            raise VerificationError(f"{mask.name}: its bits cannot be unpacked: {error}") from error
        is_same = made.dtype == bits.dtype and torch.equal(made, bits)
    if not is_same:
        raise VerificationError(f"{mask.name}: {unpacked.name} unpacks other bits than were packed")


def _run(node: fx.Node, known: dict[fx.Node, Any], rows: dict[int, int]) -> Any:
    """The result of a call on known values, with other numbers of rows in its sizes."""
    if node not in known:
        below = {source: _run(source, known, rows) for source in node.all_input_nodes}
        args: Any = list(fx.node.map_arg(node.args, below.__getitem__))
        kwargs: Any = dict(fx.node.map_arg(node.kwargs, below.__getitem__))
        if node.target in _SIZED:
            begin, *others = args[1]
            args[1] = [rows.get(begin, begin), *others]
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[node]
