"""PEFT's adapters on expert weights (``target_parameters``), as Dynamo can trace them.

PEFT registers a parametrization in every forward and removes it afterwards, which changes the
module's class and breaks the graph several times a layer -> the merged weight is passed to the
layer: ``functional_call(layer, {"down_proj": W + s L R}, x)``.

Invariant: the same is computed; in eager mode PEFT's method runs, and other backends trace it as
they would.
"""

from __future__ import annotations

from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runlora_fx._torch_compat import never_compile_alone
from runlora_fx.integrations.after_import import after_import
from runlora_fx.integrations.own_compile import is_own_compilation

_PEFT = "peft.tuners.lora.layer"
_WRAPPER = "ParamWrapper"


@cache
def make_experts_traceable() -> None:
    """Substitute the method, as soon as PEFT is imported."""
    after_import(_PEFT, _substitute)


def _substitute(module: ModuleType) -> None:
    wrapper: Any = getattr(module, _WRAPPER, None)
    if not hasattr(wrapper, "get_delta_factors"):
        return
    original = wrapper.forward

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_own_compilation() and _is_plain(self, kwargs):
            return _with_merged_weight(self, wrapper, x, *args, **kwargs)
        return original(self, x, *args, **kwargs)

    # Other backends then meet the frames that they would meet without this function.
    never_compile_alone(forward.__code__)
    wrapper.forward = wraps(original)(forward)


def _with_merged_weight(layer: Any, wrapper: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """What the forward of an adapted layer computes, without a parametrization."""
    layer._check_forward_args(x, *args, **kwargs)
    name, base = layer.parameter_name, layer.base_layer
    while isinstance(base, wrapper):  # another parameter of the same layer
        name, base = f"base_layer.{name}", base.base_layer
    return torch.func.functional_call(layer.base_layer, {name: _merged(layer)}, (x, *args), kwargs)


def _is_plain(layer: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the adapters of a layer are added to its weight, and the weight can be added to."""
    param: nn.Parameter = layer.get_param()
    is_active = not (layer.disable_adapters or layer.merged) and "adapter_names" not in kwargs
    return is_active and param.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _merged(layer: Any) -> Tensor:
    """The weight with the active adapters, in its own dtype."""
    param: Tensor = layer.get_param()
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    with torch.autocast(param.device.type, enabled=False):
        if len(adapters) == 1 and layer.num_experts > 1:
            left, right, scaling = layer.get_delta_factors(adapters[0])
            return torch.baddbmm(param, left, right, alpha=scaling)
        for name in adapters:
            param = param + layer.get_delta_weight(name)
    return param
