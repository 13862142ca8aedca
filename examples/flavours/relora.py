"""ReLoRA and XGBLoRA: adapters are merged into the weights and begin again.

Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", arXiv 2307.05695, equation
(2) and Algorithm 1: every k steps ``W <- W + s B A``, A is drawn anew, B is zero, and the
optimizer's state of A and B is pruned.

Zhang et al., "Less is More: Extreme Gradient Boost Rank-1 Adaption for Efficient Finetuning of
LLMs" (XGBLoRA), arXiv 2410.19778, Algorithm 1: the same with adapters of rank 1, each a weak
learner that trains for a few steps.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn


@torch.no_grad()
def merge_and_restart(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None, keep: float = 0.0
) -> None:
    """Merge every adapter of a PEFT model into its weight, in place, and let it begin again.

    Args:
        model: The model; its parameters keep their identity.
        optimizer: Its optimizer; the moments of the adapters are pruned.
        keep: The share of largest moments that pruning keeps; ReLoRA keeps 0 to 0.1.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        for name in layer.active_adapters:
            if name in layer.lora_A:
                layer.get_base_layer().weight.add_(layer.get_delta_weight(name))
                layer.reset_lora_parameters(name, init_lora_weights=True)
                for factor in (layer.lora_A[name], layer.lora_B[name]):
                    _prune({} if optimizer is None else optimizer.state[factor.weight], keep)


def _prune(state: dict[str, object], keep: float) -> None:
    for name in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        moment = state.get(name)
        if isinstance(moment, torch.Tensor):
            threshold = moment.abs().flatten().quantile(1 - keep) if keep else float("inf")
            moment.masked_fill_(moment.abs() <= threshold, 0.0)
