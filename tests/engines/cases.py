"""What each engine does to a model: wraps it, shards it, cuts it, and compiles it.

    ENGINES["ddp"].prepare(model, compiling)  ->  a Prepared model

``compiling`` has the backend and its options, as ``torch.compile`` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from tests.engines.model import blocks

#: ``torch.compile``'s arguments.
Compiling = Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A model as a rank trains it.

    Attributes:
        run: Computes outputs.
        part, parts: Which rows of a batch the rank takes.
    """

    run: Callable[..., Any]
    part: int = 0
    parts: int = 1


@dataclass(frozen=True)
class Engine:
    """One way to train with several processes.

    Attributes:
        name: What the command calls it.
        prepare: Prepares a model on a rank.
        ranks: How many processes there are.
        how: How they are started: ``"plain"``, ``"accelerate"``, ``"torchrun"``.
    """

    name: str
    prepare: Callable[[Any, Compiling], Prepared]
    ranks: int = 2
    how: str = "plain"


def _rows(run: Callable[..., Any]) -> Prepared:
    return Prepared(run, dist.get_rank(), dist.get_world_size())


def ddp(model: Any, compiling: Compiling, **settings: Any) -> Prepared:
    """Compiled around DDP, so that torch splits the graph at its buckets."""
    # Small buckets: a model of real size has several, too. torch splits by this constant as well.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 4096
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.02, **settings)
    return _rows(torch.compile(wrapped, **compiling))


def fsdp_whole(model: Any, compiling: Compiling) -> Prepared:
    """One group of parameters, and one compiled function."""
    fully_shard(model)
    return _rows(torch.compile(model, **compiling))


def fsdp_blocks(model: Any, compiling: Compiling) -> Prepared:
    """A group for every layer, and every layer compiled by itself."""
    for block in blocks(model):
        block.compile(**compiling)
        fully_shard(block)
    fully_shard(model)
    return _rows(model)


def _tensor_parallel(model: Any, mesh: DeviceMesh) -> None:
    """Cut the layers: q, k, v, gate and up by their outputs, o and down by their inputs.

    An adapter is cut where its layer is: B by its outputs, or A by its inputs. The other factor is
    the same on all ranks.
    """
    styles: dict[str, Any] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_B.default"), ColwiseParallel())
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_B.default"), ColwiseParallel())
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_A.default"), RowwiseParallel())
    for block in blocks(model):
        parallelize_module(block, mesh, styles)


def tensor_parallel(model: Any, compiling: Compiling) -> Prepared:
    """Tensor parallelism by DTensor; every rank has all rows."""
    _tensor_parallel(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Prepared(torch.compile(model, **compiling))


def two_by_two(model: Any, compiling: Compiling) -> Prepared:
    """FSDP2 by tensor parallelism, every layer compiled by itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    _tensor_parallel(model, mesh["tensor"])
    for block in blocks(model):
        block.compile(**compiling)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return Prepared(model, mesh["data"].get_local_rank(), 2)


def accelerated(model: Any, compiling: Compiling) -> Prepared:
    """Prepared by an Accelerator in processes that ``accelerate launch`` started."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == dist.get_world_size() > 1
    return _rows(torch.compile(accelerator.prepare(model), **compiling))


def _ddp_unused(model: Any, compiling: Compiling) -> Prepared:
    return ddp(model, compiling, find_unused_parameters=True)


def _ddp_static(model: Any, compiling: Compiling) -> Prepared:
    return ddp(model, compiling, static_graph=True)


ENGINES = {
    engine.name: engine
    for engine in (
        Engine("ddp", ddp),
        Engine("ddp-unused", _ddp_unused),
        Engine("ddp-static", _ddp_static),
        Engine("fsdp2", fsdp_whole),
        Engine("fsdp2-blocks", fsdp_blocks),
        Engine("accelerate", accelerated, how="accelerate"),
        Engine("tensor-parallel", tensor_parallel),
        Engine("2x2", two_by_two, ranks=4),
    )
}
