"""QLoRA as people run it: PEFT's adapters on 4-bit layers of bitsandbytes (arXiv 2305.14314).

    recipes.task_of(Recipe(), scale=8, device, make=nf4_model_of)

bitsandbytes has a CPU backend, so nothing is simulated. Scales are not quantised themselves.

Invariant: weights are random. Base weights are NF4 numbers in blocks of 64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from runlora_fx.cli.layers import Recipe, Shape, adapters_of, model_of
from runlora_fx.cli.without_weights import on_meta


def nf4_model_of(
    recipe: Recipe, shape: Shape, device: torch.device, *, is_adapted: bool
) -> nn.Module:
    """A layer in bfloat16 with NF4 weights, in training mode."""
    model = model_of(recipe, shape, device, is_adapted=False)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, _nf4(child))
    if is_adapted:
        model.is_loaded_in_4bit = True  # type: ignore[assignment]  # as transformers marks it
        with on_meta(torch.bfloat16, device):
            config = adapters_of(recipe, shape)
            model = get_peft_model(model, config, autocast_adapter_dtype=recipe.autocast)
    return model.train()


def constants(model: nn.Module) -> Iterator[Tensor]:
    """The scales of a model's 4-bit weights, which are neither parameters nor buffers."""
    for weight in model.parameters():
        state: Any = getattr(weight, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code)


def _nf4(linear: nn.Linear) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    _count_flops()
    dtype, device = linear.weight.dtype, linear.weight.device
    made: Any = Linear4bit(
        *(linear.in_features, linear.out_features, linear.bias is not None),
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    weight = linear.weight.detach()
    made.weight = Params4bit(
        weight, requires_grad=False, compress_statistics=False, quant_type="nf4", module=made
    )
    made.bias = linear.bias
    return made.to(device)  # type: ignore[no-any-return]  # quantises


def _count_flops() -> None:
    """Tell torch's FLOP counter what bitsandbytes' operator multiplies."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    operator = torch.ops.bitsandbytes.gemm_4bit
    if operator not in flop_registry:

        @register_flop_formula(operator)
        def flops(x: Any, packed: Any, shape: Any, *_: Any, **__: Any) -> int:
            return int(2 * torch.Size(x).numel() * shape[0])
