"""Models without data: tensors on the meta device are traced as fake tensors on the CPU.

    with torch.device("meta"):
        model = get_peft_model(LlamaForCausalLM(config), lora)     no memory, whatever its size
    explain(model, torch.empty(1, 2048, dtype=torch.long, device="meta"), device="h100")

Models and arguments that are fake tensors already are traced as they are.

Tracing makes no garbage of any size there, so Python's garbage collector is off meanwhile.

Invariant: the model is left with the tensors that it came with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from runlora_fx._torch_names import FakeTensor, FakeTensorMode, pytree
from runlora_fx.passes.pipeline import collection_paused

Inputs = tuple[Sequence[Any], Mapping[str, Any]]


@contextmanager
def without_data(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[Inputs]:
    """A context in which a model and its arguments can be traced without memory.

    Args:
        model: A module or function.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Yields:
        The arguments. They are unchanged if neither they nor the model have meta or fake tensors.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    tables = [table for m in modules for table in (m._parameters, m._buffers)]
    held: list[Any] = [t for table in tables for t in table.values()]
    given = [*held, *pytree.tree_leaves((args, kwargs))]
    mode = next((t.fake_mode for t in given if isinstance(t, FakeTensor)), None)
    if mode is None and not any(isinstance(t, Tensor) and t.is_meta for t in given):
        yield args, kwargs
        return
    mode = FakeTensorMode() if mode is None else mode
    fakes: dict[int, Any] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return value
        if id(value) not in fakes:  # tied weights stay tied
            fakes[id(value)] = _fake(value, mode)
        return fakes[id(value)]

    came: list[dict[str, Any]] = [dict(table) for table in tables]
    try:
        for table in tables:
            table.update({name: fake(value) for name, value in table.items()})
        with mode, collection_paused():
            yield pytree.tree_map(fake, (tuple(args), dict(kwargs)))
    finally:
        for table, before in zip(tables, came, strict=True):
            table.update(before)


def _fake(value: Tensor, mode: FakeTensorMode) -> Tensor:
    """A fake tensor like a tensor of data or of the meta device."""
    if not value.is_meta:
        return mode.from_tensor(value)
    with mode:
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    if isinstance(value, nn.Parameter):
        return nn.Parameter(made, requires_grad=value.requires_grad)
    return made.requires_grad_(value.requires_grad) if value.is_floating_point() else made
