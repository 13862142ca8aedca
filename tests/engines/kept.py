"""What a forward keeps for its backward on one rank, in real tensors as in fake ones.

keep = Kept(model.parameters())
with saved_tensors_hooks(keep, lambda x: x):
    outputs = model(x)
keep.bytes
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(x: Tensor) -> Tensor:
    """A rank's part of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


class Kept:
    """A hook that lists the storages that are saved, each once and in full."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        """Leave out some tensors: this rank's parts of weights, and inputs."""
        self._known = {local(x).untyped_storage()._cdata for x in given}
        self._held: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        """List the storage of a tensor, once."""
        storage = local(x).untyped_storage()
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self._held.append(x)
        return x

    @property
    def bytes(self) -> int:
        """What the storages hold now: whole weights that FSDP2 has freed hold nothing [B]."""
        return sum(local(x).untyped_storage().nbytes() for x in self._held)
