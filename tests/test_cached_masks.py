"""Masks that the backward draws again, in code that comes from a warm cache.

Two processes share one fresh cache folder. Each trains the same model with dropout for a step under
`memory="low"`, which keeps no mask. The second process is served from the caches.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

TOKENS, WIDTH, RANK = 96, 32, 4

SCRIPT = f"""
import hashlib, json, sys

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config
from torch.autograd.graph import saved_tensors_hooks

import runlora_fx

config.cpp.simdlen = 1  # compiles faster

class Adapted(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear({WIDTH}, {WIDTH}, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear({WIDTH}, {RANK}, bias=False)
        self.lora_B = nn.Linear({RANK}, {WIDTH}, bias=False)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        h = torch.nn.functional.silu(x)
        return x + self.base_layer(h) + self.lora_B(self.lora_A(self.dropout(h)))

torch.manual_seed(0)
model = Adapted()
x = torch.randn({TOKENS}, {WIDTH}, requires_grad=True)
weights, direction = torch.randn({TOKENS}, {WIDTH}), torch.randn({TOKENS}, {WIDTH})
options = {{"runlora.memory": "low", "runlora.objective": "flops"}}
run = torch.compile(model, backend="runlora", fullgraph=True, options=options)

def value(at):
    torch.manual_seed(1)
    return run(at.detach().requires_grad_()).double().mul(weights).sum().item()

torch.manual_seed(1)
y = run(x)
wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
gradients = torch.autograd.grad((y * weights).sum(), wanted)
counted = {{**counters["inductor"], **counters["aot_autograd"]}}
found_there = ("cache_hit", "cache_bypass")
from_cache = runlora_fx.last_report().from_cache

kept = []

def keep(tensor):
    kept.append([str(tensor.dtype), tensor.numel()])
    return tensor

with saved_tensors_hooks(keep, lambda tensor: tensor):
    run(x)

step = 1e-2
found = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
predicted = (gradients[0].double() * direction).sum().item()
digest = hashlib.sha256()
for tensor in (y, *gradients):
    digest.update(tensor.detach().numpy().tobytes())
print("RESULT", json.dumps({{
    "hits": {{name: n for name, n in counted.items() if name.endswith(found_there)}},
    "from_cache": from_cache,
    "digest": digest.hexdigest(),
    "kept": kept,
    "error": abs(found - predicted) / (gradients[0].norm() * direction.norm()).item(),
}}))
"""


@dataclass(frozen=True)
class Outcome:
    """What a process says.

    Attributes:
        hits: Of which cache how many graphs came.
        from_cache: What `last_report()` says.
        digest: Of the bits of the output and of all gradients.
        kept: Dtype and elements of what the forward saves.
        error: Of the gradient along a direction, against finite differences at the same seed;
            relative to the largest that it could be.
    """

    hits: dict[str, int]
    from_cache: bool
    digest: str
    kept: list[tuple[str, int]]
    error: float


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    """Of two processes, one after the other."""
    cache = tmp_path_factory.mktemp("cache")
    switches = ("TORCHINDUCTOR_", "TORCH_COMPILE_", "TORCH_LOGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(switches)}
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**environment, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
            cwd=cache,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        found.append(Outcome(**json.loads(line.removeprefix("RESULT "))))
    return found


def test_the_second_process_is_served_from_the_caches(outcomes: list[Outcome]) -> None:
    first, second = outcomes
    assert first.hits == {}
    assert not first.from_cache
    assert second.hits == {"autograd_cache_hit": 1, "fxgraph_cache_hit": 2}
    assert second.from_cache


def test_no_mask_is_kept(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.kept
        assert not [dtype for dtype, count in outcome.kept if dtype == "torch.bool"]
        # Of the size of an activation only the model's input, which silu is made again of.
        assert [count for _, count in outcome.kept].count(TOKENS * WIDTH) == 1


def test_gradients_are_the_same_bit_for_bit(outcomes: list[Outcome]) -> None:
    first, second = outcomes
    assert first.digest == second.digest


def test_the_backward_sees_the_masks_of_the_forward(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.error < 1e-3
