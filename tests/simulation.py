"""Simulation: what each of 8 x 8 ranks would hold and move for a Llama of 70B, and what it plans.

    python -m tests.simulation                  tensor parallel by 8, FSDP2 by 8
    python -m tests.simulation --tokens 8192

One process plays one rank: torch's fake process group does no communication, and the tensors are
fake, so nothing is computed and no memory is needed. DTensor and FSDP2 are traced as they are, and
each layer is compiled by itself. All figures are counted: two layers run, and what they hold and
move is multiplied by 40. Embeddings, the last norm and the head are left out.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from runlora_fx.history import collecting
from tests.engines.cases import cut_layers
from tests.engines.kept import Kept, local

#: Llama 3 70B.
LAYERS = 80
SHAPE: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "use_cache": False,
}

#: The backend without the pass.
PLAIN = "aot_eager_decomp_partition"

#: The layers that run. They are alike.
COMPILED = 2

_PREFIXES = ("c10d::", "_c10d_functional::")


class Moved(TorchDispatchMode):
    """Counts collectives that run inside, and the bytes of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles inside of it."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and add what it moves."""
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name.startswith(_PREFIXES) and not name.endswith(("wait_tensor", "barrier")):
            short = name.split("::")[1].strip("_").removesuffix("_base")
            moved = [x for x in tree_leaves(found) if isinstance(x, Tensor)]
            self.calls[short] += 1
            self.bytes[short] += sum(x.numel() * x.itemsize for x in moved)
        return found


@dataclass
class Seen:
    """What one rank holds and moves with :data:`COMPILED` layers.

    Attributes:
        frozen, trained: Bytes of this rank's shards of a layer's weights [B].
        kept: Bytes that a layer's forward keeps for the backward, weights aside [B].
        calls, moved: By collective, calls and bytes returned, forward and backward of a layer [B].
        sites: What was decided for a layer, in order.
    """

    frozen: int = 0
    trained: int = 0
    kept: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    sites: list[Any] = field(default_factory=list)


def size(x: Tensor) -> int:
    """Bytes of a rank's part of a tensor [B]."""
    part = local(x)
    return part.numel() * part.itemsize


def model_of(layers: int, rank: int) -> Any:
    """A model in bfloat16 with adapters on all linear layers but the head, of fake tensors.

    It is made on the meta device, because PEFT moves adapters, which fake tensors do not bear.
    """
    with unset_fake_temporarily(), torch.device("meta"):
        base: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers))
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
        model = get_peft_model(base, config).to(torch.bfloat16)
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                if value is not None:
                    made: Any = torch.empty_like(value, device="cpu")
                    if isinstance(value, nn.Parameter):
                        made = nn.Parameter(made, requires_grad=value.requires_grad)
                    table[name] = made
    return model.train()


def simulate(options: argparse.Namespace, backend: str) -> Seen:
    """Play one rank: train one step on fake tensors."""
    torch._dynamo.reset()
    torch._dynamo.config.inline_torch_dispatch_torch_compile = False
    seen = Seen()
    ours = {"runlora.strict": True, "runlora.device": options.device}
    given: Any = ours if backend == "runlora_eager" else None
    mesh = init_device_mesh(
        "cpu", (options.data, options.tensor), mesh_dim_names=("data", "tensor")
    )
    data, tensor = mesh["data"], mesh["tensor"]  # made of numbers, so not among fake tensors
    with Fake(allow_non_fake_inputs=True), real_meshes(), collecting() as reports:
        model = model_of(COMPILED, options.rank)
        blocks = cut_layers(model, tensor)
        for block in blocks:
            block.compile(backend=backend, options=given)
            fully_shard(block, mesh=data, reshard_after_forward=True)
        weights = [p for block in blocks for p in block.parameters()]
        seen.frozen = sum(size(p) for p in weights if not p.requires_grad) // COMPILED
        seen.trained = sum(size(p) for p in weights if p.requires_grad) // COMPILED
        x = torch.randn(1, options.tokens, SHAPE["hidden_size"], dtype=torch.bfloat16)
        x.requires_grad_()
        places = torch.arange(options.tokens)[None]
        turned = model.get_base_model().model.rotary_emb(x, places)
        keep = Kept(weights)
        moved = Moved()
        with moved, saved_tensors_hooks(keep, lambda t: t):
            y = x
            for block in blocks:
                y = block(y, attention_mask=None, position_ids=places, position_embeddings=turned)
        seen.kept = keep.bytes // COMPILED
        with moved:
            y.sum().backward()
    seen.calls = Counter({name: n // COMPILED for name, n in moved.calls.items()})
    seen.moved = Counter({name: n // COMPILED for name, n in moved.bytes.items()})
    seen.sites = [site for report in reports for site in report.sites]
    return seen


class Fake(FakeTensorMode):
    """Fake tensors among which Dynamo compiles."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo compiles inside of it."""
        return True


@contextmanager
def real_meshes() -> Iterator[None]:
    """FSDP2 joins meshes, whose numbers must be real ones also among fake tensors."""
    join = DeviceMesh._concatenate

    def joined(meshes: list[DeviceMesh]) -> DeviceMesh:
        with unset_fake_temporarily():
            return join(meshes)

    with patch.object(DeviceMesh, "_concatenate", staticmethod(joined)):
        yield


def gib(count: int) -> str:
    """Bytes as text."""
    return f"{count / 2**30:,.2f} GiB"


def main() -> None:
    """Play a rank under both backends and print what it would hold and move."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--data", type=int, default=8, help="ranks that FSDP2 shards over")
    parser.add_argument("--tensor", type=int, default=8, help="ranks that cut the layers")
    parser.add_argument("--tokens", type=int, default=4096, help="of each rank")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--device", default="h100", help="what plans are made for")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    world = asked.data * asked.tensor
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    # Both cut the graph as Inductor does, and save what a minimal cut saves.
    plain, ours = (simulate(asked, name) for name in (PLAIN, "runlora_eager"))
    print(
        f"Llama of 70B, bfloat16, adapters of rank {asked.rank}, {asked.data} x {asked.tensor} "
        f"ranks, {asked.tokens} tokens each, planned for {asked.device}. Simulated: fake tensors "
        f"and a fake group. Counted for {COMPILED} layers, times {LAYERS / COMPILED:g}."
    )
    print(f"held by a rank: frozen weights {gib(LAYERS * ours.frozen)}")
    print(f"  adapters {gib(LAYERS * ours.trained)}, their gradients the same")
    print(
        f"  kept for the backward {gib(LAYERS * ours.kept)}, as it came {gib(LAYERS * plain.kept)}"
    )
    print("moved by a rank in a step, results of collectives:")
    for name in sorted(ours.moved | plain.moved):
        calls, before = ours.calls[name], plain.calls[name]
        print(
            f"  {name}: {LAYERS * calls} calls, {gib(LAYERS * ours.moved[name])}; as it came "
            f"{LAYERS * before} calls, {gib(LAYERS * plain.moved[name])}"
        )
    changed = sum(site.changed for site in ours.sites)
    print(f"sites: {changed} of {len(ours.sites)} rewritten; Dynamo compiles equal layers once")
    for site in ours.sites:
        names = ", ".join(name.split(".")[-1] for name in site.modules)
        print(f"  {names} ({site.shapes}): {'; '.join(site.after.splitlines())}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
