"""Estimator: predicted times of single operators, for torch's own choice of what to recompute.

    torch._functorch.config.activation_memory_budget = 0.5
    torch._functorch.config.activation_memory_budget_runtime_estimator = ProfileEstimator()

With a budget below 1, the partitioner recomputes the activations that are fastest to recompute,
until the rest fits. By default it compares FLOPs, so pointwise operators are free. With this
estimator it compares the times that the machine's profile predicts.

Invariant: equal nodes have equal times, and the key in the caches changes with every number of the
profile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from runlora_fx import __version__
from runlora_fx._torch_compat import (
    TAKES_ESTIMATORS,
    CustomRuntimeEstimator,
    fake_mode_of,
    in_fake_mode,
    size_hint,
)
from runlora_fx._torch_names import pytree
from runlora_fx.cost_model.cost import FREE, Cost
from runlora_fx.cost_model.devices.elsewhere import machine_for
from runlora_fx.cost_model.profile import DTYPES
from runlora_fx.passes.recompute.chains import SPECIAL

#: The assumed size of an unbacked symbol [elements]; torch assumes the same.
_UNKNOWN = 4096

_aten = torch.ops.aten

#: Operators that torch's FLOP counter does not know, and equivalent ones that it knows.
_ALIKE = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _aten._scaled_dot_product_flash_attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        _aten._scaled_dot_product_flash_attention_backward
    ),
}

#: The time of an operator that costs nothing, such as a view [s]. The partitioner divides by times.
_LEAST_S = 1e-12


class ProfileEstimator(CustomRuntimeEstimator):
    """The time of a node by the profile of a machine, as torch's partitioner asks for it.

    A product takes the time of its FLOPs, as torch's FLOP counter gives them, of its bytes and of a
    launch. A pointwise operator takes the time of its bytes, special functions and random numbers,
    and no launch, because it is fused. A view takes none.
    """

    def __init__(self, device: str = "") -> None:
        """Look the profile up.

        Args:
            device: As the option ``runlora.device``; empty for the device that a graph runs on.

        Raises:
            ValueError: If the device is not known.
            RuntimeError: If this version of torch takes no object as an estimator; 2.13 does.
        """
        if not TAKES_ESTIMATORS:
            raise RuntimeError(
                f"torch {torch.__version__} takes no object as runtime estimator; 2.13 does"
            )
        self._machine = machine_for(device, use_stored=True)

    def __call__(self, node: fx.Node) -> float:
        """The predicted time of a node of a joint graph [ms]; more than 0."""
        results = [val for val in pytree.tree_leaves(node.meta.get("val")) if _is_tensor(val)]
        if not results or node.op != "call_function":
            return _LEAST_S * 1e3
        dtype = str(results[0].dtype).removeprefix("torch.")
        if dtype not in DTYPES:  # a mask
            dtype = "float32"
        profile = self._machine.profile(results[0].device, dtype)
        return max(profile.of(cost_of(node)), _LEAST_S) * 1e3

    def uuid(self) -> Any:
        """The key in torch's caches."""
        return ("runlora", __version__, self._machine.identity())


def cost_of(node: fx.Node) -> Cost:
    """What a node of a graph costs if it runs by itself, as amounts of the profile's terms.

    Args:
        node: With an example value in ``meta["val"]``. Symbolic sizes count as when it was traced.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.is_view:
        return FREE
    read = sum(_bytes(given) for given in dict.fromkeys(node.all_input_nodes))
    written = _bytes(node)
    if flops := _flops(node, target):
        return Cost({"flops.nn": flops, "read": read, "written": written, "launches": 1})
    elements = sum(_numel(val) for val in pytree.tree_leaves(node.meta["val"]) if _is_tensor(val))
    is_random = torch.Tag.nondeterministic_seeded in target.tags
    amounts: Mapping[str, int] = {
        "elementwise": read + written,
        "special": elements if target in SPECIAL else 0,
        "random": elements if is_random else 0,
    }
    return Cost(amounts)


def _flops(node: fx.Node, target: torch._ops.OpOverload) -> int:
    """The FLOPs of a product or of attention; 0 for what torch's counter does not know."""
    packet = target.overloadpacket
    formula = flop_registry.get(_ALIKE.get(packet, packet))
    if formula is None:
        return 0

    def shown(value: Any) -> Any:
        value = value.meta.get("val") if isinstance(value, fx.Node) else value
        return value.new_empty(_shape(value)) if _is_tensor(value) else value

    with in_fake_mode(fake_mode_of(pytree.tree_leaves(node.meta["val"]))):
        args, kwargs, out = pytree.tree_map(shown, (node.args, node.kwargs, node.meta["val"]))
    return int(formula(*args, **kwargs, out_val=out))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _hint(size: Any, mode: Any) -> int:
    return size if isinstance(size, int) else size_hint(size.node.expr, mode, _UNKNOWN)


def _shape(tensor: Tensor) -> torch.Size:
    """The sizes of a tensor, symbolic ones as when it was traced."""
    mode = fake_mode_of([tensor])
    return torch.Size([_hint(size, mode) for size in tensor.shape])


def _numel(tensor: Tensor) -> int:
    return int(_shape(tensor).numel())


def _bytes(node: fx.Node) -> int:
    """The size of the tensors that a node makes [B]."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return sum(_numel(val) * val.itemsize for val in values if _is_tensor(val))
