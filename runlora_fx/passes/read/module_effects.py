"""Effects of module calls: ``call_module`` nodes, as ``torch.fx.symbolic_trace`` writes them.

    nn.ReLU(inplace=True)        writes its argument
    nn.BatchNorm1d in training   writes its running statistics
    nn.Dropout in training       is random
    a module of the user's       may do anything to its arguments and to its own state

Invariant: if an answer is wrong, it is too cautious.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrize

from runlora_fx.passes.levels.modules import drops_nothing, is_hooked

#: Modules that return new memory, whatever their arguments.
_FRESH = (
    *(nn.Linear, nn.Bilinear, nn.Embedding, nn.LayerNorm, nn.GroupNorm),
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
)

#: Modules that update running statistics in training.
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)

#: Modules that draw nothing, in training or not.
_DETERMINISTIC = (*_FRESH, *_NORMS, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class ModuleEffects:
    """What one call of a module does.

    Attributes:
        is_random: True if two calls on equal arguments may return different tensors.
        is_fresh: True if the result is new memory.
        writes_arguments: True if its arguments may be modified.
        written: The memory of its state that may be modified.
        state: The memory of all its parameters and buffers.
    """

    is_random: bool
    is_fresh: bool
    writes_arguments: bool
    written: frozenset[Hashable]
    state: frozenset[Hashable]

    @property
    def is_pure(self) -> bool:
        """True if a call does nothing but return what its arguments and the state determine."""
        return not (self.is_random or self.writes_arguments or self.written)


def module_effects(module: nn.Module, memory: Callable[[torch.Tensor], Hashable]) -> ModuleEffects:
    """The effects of calling a module.

    Args:
        module: The module, in the mode (training or not) that it is called in.
        memory: Names the memory of a tensor.
    """
    parts = list(module.modules())
    state = frozenset(map(memory, (*module.parameters(), *module.buffers())))
    is_known = all(map(_is_known, parts))
    written = state if not is_known else frozenset(memory(t) for m in parts for t in _written(m))
    is_inplace = any(getattr(part, "inplace", False) for part in parts)
    return ModuleEffects(
        is_random=not is_known or not all(map(_draws_nothing, parts)),
        is_fresh=is_known and isinstance(module, _FRESH),
        writes_arguments=not is_known or is_inplace,
        written=written,
        state=state,
    )


def _is_known(module: nn.Module) -> bool:
    """True if a module is one of torch's own and computes what its class says."""
    is_own = type(module).__module__.startswith("torch.nn.modules.")
    return is_own and not is_hooked(module) and not parametrize.is_parametrized(module)


def _draws_nothing(module: nn.Module) -> bool:
    return isinstance(module, _DETERMINISTIC) or not module.training or drops_nothing(module)


def _written(module: nn.Module) -> list[torch.Tensor]:
    """The state that calling one of torch's own modules modifies."""
    if isinstance(module, _NORMS) and module.training and module.track_running_stats:
        found = (module.running_mean, module.running_var, module.num_batches_tracked)
        return [tensor for tensor in found if tensor is not None]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return [module.weight]
    return []
