"""Experts: PEFT's adapters on expert weights (``target_parameters``), as Dynamo can trace them.

PEFT registers a parametrization in every forward and removes it afterwards: that changes the
module's class, and breaks the graph several times a layer. While tracing, the merged weights are
passed to the layer instead; what is computed is the same.
"""

from __future__ import annotations

from functools import cache, wraps
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from runlora_fx.integrations.after_import import after_import

_PEFT = "peft.tuners.lora.layer"
_WRAPPER = "ParamWrapper"


@cache
def make_experts_traceable() -> None:
    """Have Dynamo trace PEFT's adapters on parameters, whenever PEFT is imported."""
    after_import(_PEFT, _patch)


def _patch(module: ModuleType) -> None:
    wrapper: Any = getattr(module, _WRAPPER, None)
    if not hasattr(wrapper, "get_delta_factors"):
        return
    original = wrapper.forward

    @wraps(original)
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() or not _is_plain(self, kwargs):
            return original(self, x, *args, **kwargs)
        self._check_forward_args(x, *args, **kwargs)
        name, layer = self.parameter_name, self.base_layer
        while isinstance(layer, wrapper):  # another parameter of the same layer
            name, layer = f"base_layer.{name}", layer.base_layer
        weights = {name: _merged(self)}
        return torch.func.functional_call(self.base_layer, weights, (x, *args), kwargs)

    wrapper.forward = forward


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
