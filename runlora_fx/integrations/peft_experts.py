"""PEFT's adapters on expert weights (``target_parameters``), as Dynamo can trace them.

PEFT registers a parametrization in every forward and removes it afterwards, which changes the
module's class and breaks the graph several times a layer -> the merged weight is passed to the
layer: ``functional_call(layer, {"down_proj": W + s L R}, x)``.

Invariant: both compute the same. Eager mode runs PEFT's own method, and other backends trace it.
"""

from __future__ import annotations

from functools import wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runlora_fx._torch_compat import never_compile_alone
from runlora_fx.integrations.own_compile import is_own_compilation

_WRAPPER = "ParamWrapper"


def substitute(module: ModuleType) -> None:
    """Substitute the forward of a class of ``peft.tuners.lora.layer``."""
    wrapper: Any = getattr(module, _WRAPPER, None)
    if not hasattr(wrapper, "get_delta_factors"):
        return
    original = wrapper.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_own_compilation() and _is_plain(self, kwargs):
            return _with_merged_weight(self, wrapper, x, *args, **kwargs)
        return original(self, x, *args, **kwargs)

    # For other backends this function adds no frame that Dynamo compiles.
    never_compile_alone(forward.__code__)
    wrapper.forward = wraps(original)(forward)


def _with_merged_weight(layer: Any, wrapper: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Compute the forward of an adapted layer without a parametrization."""
    layer._check_forward_args(x, *args, **kwargs)
    name, base = layer.parameter_name, layer.base_layer
    while isinstance(base, wrapper):  # another parameter of the same layer
        name, base = f"base_layer.{name}", base.base_layer
    return torch.func.functional_call(layer.base_layer, {name: _merged(layer)}, (x, *args), kwargs)


def _is_plain(layer: Any, kwargs: dict[str, Any]) -> bool:
    """True if adapters are active, not merged, and can be added to the weight in its dtype."""
    param: nn.Parameter = layer.get_param()
    is_active = not (layer.disable_adapters or layer.merged) and "adapter_names" not in kwargs
    return is_active and param.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _merged(layer: Any) -> Tensor:
    """The weight plus the updates of its active adapters, in its own dtype."""
    param: Tensor = layer.get_param()
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    with torch.autocast(param.device.type, enabled=False):
        if len(adapters) == 1 and layer.num_experts > 1:
            left, right, scaling = layer.get_delta_factors(adapters[0])
            return torch.baddbmm(param, left, right, alpha=scaling)
        for name in adapters:
            param = param + layer.get_delta_weight(name)
    return param
