"""Flat-LoRA: the loss is taken at randomly perturbed weights.

Li et al., "Flat-LoRA: Low-Rank Adaptation over a Flat Loss Landscape", arXiv 2409.14396, section
3.3: for every step

    W <- W + E,    E_ij ~ N(0, sigma^2 / n |W'_i|^2),    W' = W + s B A  (out, n)

with |W'_i| the norm of row i of the merged weight. After the backward the same noise, drawn again
from its seed, is taken away: it need not be kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


@contextmanager
def perturbed(model: nn.Module, sigma: float, seed: int) -> Iterator[None]:
    """Perturb the base weights of a PEFT model, in place, while the block runs.

    Args:
        model: The model.
        sigma: Strength of the perturbation.
        seed: Seed of the noise.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    scales = [sigma * row_norms(layer) / layer.in_features**0.5 for layer in layers]
    _add_noise(layers, scales, seed, sign=1.0)
    try:
        yield
    finally:
        _add_noise(layers, scales, seed, sign=-1.0)


@torch.no_grad()
def row_norms(layer: LoraLayer) -> Tensor:
    """Norms of the rows of ``W + s B A`` (out, 1)."""
    merged = layer.get_base_layer().weight
    for name in layer.active_adapters:
        merged = merged + layer.get_delta_weight(name)
    return torch.linalg.vector_norm(merged, dim=1, keepdim=True)


@torch.no_grad()
def _add_noise(layers: list[LoraLayer], scales: list[Tensor], seed: int, sign: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer, scale in zip(layers, scales, strict=True):
        weight = layer.get_base_layer().weight
        noise = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        weight.add_(sign * scale * noise.to(weight.device))
