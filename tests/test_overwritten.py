"""Buffers that the forward overwrites: the backward uses the numbers that the forward read.

AOTAutograd writes the updates of buffers at the end of the joint graph, but the forward does them.
The partitioner does not see this, so that whatever is computed again in the backward of an updated
buffer is wrong.
"""

import pytest
import torch
import torch.nn.functional as F
from checks import assert_same_outputs_and_grads
from torch import Tensor, nn

from runlora_fx.aot import aot_backend
from runlora_fx.options import MemoryName, ObjectiveName, Options

TOKENS, WIDTH, RANK = 64, 32, 4
RTOL = 1e-9  # all in double precision


class Adapted(nn.Module):
    """A frozen weight with an adapter, and activations that are kept in a buffer."""

    held: Tensor
    weight: Tensor
    frozen: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.register_buffer("held", random(TOKENS, WIDTH))
        self.register_buffer("weight", random(WIDTH, WIDTH))
        self.register_buffer("frozen", random(RANK, WIDTH))
        self.a = nn.Parameter(random(RANK, WIDTH))
        self.b = nn.Parameter(random(WIDTH, RANK))

    def adapted(self, x: Tensor, a: Tensor) -> Tensor:
        return x @ self.weight.T + 2 * (x @ a.T @ self.b.T)


class OperandUpdated(Adapted):
    """The operand of the gradient is an activation of one kernel: memory policies recompute it."""

    def forward(self, x: Tensor) -> Tensor:
        self.held.mul_(0.9).add_(0.1)
        return self.held @ self.a.T + x @ self.a.T


class WeightUpdated(Adapted):
    """A merged weight is made again in the backward."""

    def forward(self, x: Tensor) -> Tensor:
        self.weight.mul_(0.9)
        return self.adapted(x, self.a)


class UpdatedBehind(Adapted):
    """The backward reads X A', which a merged forward does not compute."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.adapted(self.held, self.frozen) + x
        self.held.add_(1)
        return y


class UpdatedThroughViews(Adapted):
    """The same, where what is read and what is written are views."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.adapted(self.held.view(2, TOKENS // 2, WIDTH), self.frozen)
        self.held.view(TOKENS * WIDTH).add_(1)
        return y.view(TOKENS, WIDTH) + x


class ActivationOfUpdated(Adapted):
    """An activation of the buffer is cheap to make again."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.adapted(F.gelu(self.held), self.a) + x
        self.held.add_(1)
        return y


@pytest.mark.parametrize("objective", ("time", "flops"))
@pytest.mark.parametrize("memory", ("balanced", "low", "fast"))
@pytest.mark.parametrize(
    "model_type",
    (OperandUpdated, WeightUpdated, UpdatedBehind, UpdatedThroughViews, ActivationOfUpdated),
)
def test_the_backward_uses_what_the_forward_read(
    model_type: type[Adapted], memory: MemoryName, objective: ObjectiveName
) -> None:
    torch._dynamo.reset()
    budget = 1 << 20 if memory == "fast" else 0
    options = Options(
        strict=True, objective=objective, memory=memory, memory_budget=budget, device="h100"
    )
    backend = aot_backend(options, joins_in_place=True)
    x = torch.randn(TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    model, other = model_type(), model_type()
    compiled = torch.compile(other, backend=backend, fullgraph=True)
    for _ in range(2):  # the buffer has other contents the second time
        assert_same_outputs_and_grads(model, compiled, [x], RTOL)
    assert torch.equal(model.held, other.held)
    assert torch.equal(model.weight, other.weight)
