"""LoRA on weights that are dequantised in the graph, as HQQ and GPTQ do it.

QLoRA (Dettmers et al., arXiv 2305.14314) trains adapters on a frozen, quantised weight:
``Y = X deq(W_q)' + s (X A') B'``. The dequantised weight is a temporary of every forward and of
every backward. Two ways to make it, from plain tensor operations:

- HQQ, Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023:
  ``(W_q - zero) * scale`` in groups along the rows, two 4-bit numbers in a byte.
- GPTQ, Frantar et al., arXiv 2210.17323, in the layout of its public checkpoints: eight 4-bit
  numbers in an int32, scales and zero points of each group of inputs, ``g_idx`` from inputs to
  groups.

Quantisation here rounds to nearest; how the numbers are found does not change how they are used.
"""

import torch
from torch import Tensor, nn

_BITS = 4
_MAX = 2**_BITS - 1


class HqqLinear(nn.Module):
    """A frozen linear layer with HQQ's layout, dequantised at every use."""

    def __init__(self, linear: nn.Linear, group_size: int = 64) -> None:
        super().__init__()
        weight = linear.weight.detach()
        groups = weight.reshape(-1, group_size)
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-8) / _MAX
        zero = -low / scale
        numbers = torch.round(groups / scale + zero).clamp(0, _MAX).to(torch.uint8)
        half = len(numbers) // 2
        self.shape = weight.shape
        self.register_buffer("packed", (numbers[:half] << _BITS) | numbers[half:])
        self.register_buffer("scale", scale)
        self.register_buffer("zero", zero)
        self.bias = linear.bias

    def dequantise(self) -> Tensor:
        """The weight (out, in)."""
        numbers = torch.cat([self.packed >> _BITS, self.packed & _MAX]).to(self.scale.dtype)
        return ((numbers - self.zero) * self.scale).reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        out = torch.matmul(x, self.dequantise().t())
        return out if self.bias is None else out + self.bias


class GptqLinear(nn.Module):
    """A frozen linear layer with GPTQ's layout, dequantised at every use."""

    def __init__(self, linear: nn.Linear, group_size: int = 32) -> None:
        super().__init__()
        weight = linear.weight.detach().t()  # (in, out)
        features_in, features_out = weight.shape
        groups = weight.reshape(-1, group_size, features_out)
        low, high = groups.amin(1), groups.amax(1)
        scales = (high - low).clamp(min=1e-8) / _MAX
        # One is added to the stored zero point when it is read.
        zeros = torch.round(-low / scales).clamp(1, _MAX)
        numbers = torch.round(groups / scales[:, None] + zeros[:, None]).clamp(0, _MAX)
        self.register_buffer("shifts", torch.arange(0, 32, _BITS, dtype=torch.int32))
        columns = numbers.reshape(-1, 8, features_out).to(torch.int32) << self.shifts[None, :, None]
        self.register_buffer("qweight", columns.sum(1, dtype=torch.int32))
        rows = (zeros - 1).reshape(len(zeros), -1, 8).to(torch.int32) << self.shifts[None, None]
        self.register_buffer("qzeros", rows.sum(2, dtype=torch.int32))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", torch.arange(features_in) // group_size)
        self.bias = linear.bias

    def dequantise(self) -> Tensor:
        """The weight (in, out): GPTQ stores it transposed."""
        zeros = torch.bitwise_right_shift(self.qzeros[:, :, None], self.shifts[None, None])
        zeros = (torch.bitwise_and(zeros, _MAX) + 1).reshape(self.scales.shape)
        numbers = torch.bitwise_right_shift(self.qweight[:, None], self.shifts[None, :, None])
        numbers = torch.bitwise_and(numbers, _MAX).reshape(-1, self.qweight.shape[1])
        return self.scales[self.g_idx] * (numbers - zeros[self.g_idx])

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        out = torch.matmul(x, self.dequantise())
        return out if self.bias is None else out + self.bias


class QLora(nn.Module):
    """``Y = X deq(W_q)' + s (X A') B'`` over a quantised layer."""

    def __init__(self, base: nn.Module, linear: nn.Linear, rank: int, scaling: float) -> None:
        super().__init__()
        self.base = base
        for buffer in base.parameters():
            buffer.requires_grad_(False)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.02)
        self.scaling = scaling

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling


def hqq_lora(linear: nn.Linear, rank: int, scaling: float = 2.0) -> QLora:
    """A linear layer, quantised as HQQ does it, with an adapter."""
    return QLora(HqqLinear(linear), linear, rank, scaling)


def gptq_lora(linear: nn.Linear, rank: int, scaling: float = 2.0) -> QLora:
    """A linear layer, quantised as GPTQ does it, with an adapter."""
    return QLora(GptqLinear(linear), linear, rank, scaling)
