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
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
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
        step: Runs forward and backward of a whole batch, and returns the loss; None where it is
            not known. Set by pipelines, which have no single forward.
        owned: What the names of this rank's weights contain; empty for all.
    """

    run: Callable[..., Any]
    part: int = 0
    parts: int = 1
    step: Callable[[Mapping[str, Tensor]], float | None] | None = None
    owned: tuple[str, ...] = ()


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


def cut_layers(model: Any, mesh: DeviceMesh) -> list[nn.Module]:
    """Cut the layers of a Llama, and return them.

    q, k, v, gate and up are cut by their outputs, o and down by their inputs. An adapter is cut
    where its layer is: B by its outputs, or A by its inputs. The other factor is the same on all
    ranks.
    """
    styles: dict[str, Any] = {}
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_B.default"), ColwiseParallel())
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_B.default"), ColwiseParallel())
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        styles |= dict.fromkeys((f"{name}.base_layer", f"{name}.lora_A.default"), RowwiseParallel())
    found = blocks(model)
    for block in found:
        parallelize_module(block, mesh, styles)
    return found


def tensor_parallel(model: Any, compiling: Compiling) -> Prepared:
    """Tensor parallelism by DTensor; every rank has all rows."""
    cut_layers(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Prepared(torch.compile(model, **compiling))


def two_by_two(model: Any, compiling: Compiling) -> Prepared:
    """FSDP2 by tensor parallelism, every layer compiled by itself."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    cut_layers(model, mesh["tensor"])
    for block in blocks(model):
        block.compile(**compiling)
        fully_shard(block, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])
    return Prepared(model, mesh["data"].get_local_rank(), 2)


class Stage(nn.Module):
    """Half of the layers: the first has the embeddings, the last the head."""

    def __init__(self, model: Any, index: int, count: int) -> None:
        super().__init__()
        whole = model.get_base_model()
        layers = whole.model.layers
        each = len(layers) // count
        self.layers = layers[index * each : (index + 1) * each]
        self.rotary = whole.model.rotary_emb
        self.embedded = whole.model.embed_tokens if index == 0 else None
        self.head = nn.Sequential(whole.model.norm, whole.lm_head) if index == count - 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Ids or activations of some rows -> activations or logits."""
        x = x if self.embedded is None else self.embedded(x)
        places = torch.arange(x.shape[1])[None]
        turned = self.rotary(x, places)
        for layer in self.layers:
            x = layer(x, attention_mask=None, position_ids=places, position_embeddings=turned)
        return x if self.head is None else self.head(x)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def pipeline(model: Any, compiling: Compiling, schedule: Any = ScheduleGPipe) -> Prepared:
    """Two stages, two microbatches; every stage is compiled."""
    index, count = dist.get_rank(), dist.get_world_size()
    run = torch.compile(Stage(model, index, count), **compiling)
    stage = PipelineStage(run, index, count, torch.device("cpu"))
    plan = schedule(stage, n_microbatches=2, loss_fn=_loss)

    def step(given: Mapping[str, Tensor]) -> float | None:
        losses: list[Tensor] = []
        if index == 0:
            plan.step(given["input_ids"])
        else:
            plan.step(target=given["labels"], losses=losses)
        return sum(x.item() for x in losses) / len(losses) if losses else None

    return Prepared(run, step=step, owned=(f".layers.{index}.",))


def pipeline_1f1b(model: Any, compiling: Compiling) -> Prepared:
    """The same, with backwards between the forwards."""
    return pipeline(model, compiling, Schedule1F1B)


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
        Engine("pipeline", pipeline),
        Engine("pipeline-1f1b", pipeline_1f1b),
        Engine("elastic", ddp, how="torchrun"),
        Engine("2x2", two_by_two, ranks=4),
    )
}
