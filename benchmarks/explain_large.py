"""What it takes to explain a model that does not fit here: seconds, CPU seconds, peak memory.

    python benchmarks/explain_large.py [8b] [70b] [--device h100]

The models are Llama-3's by their configurations, on the meta device, with LoRA of rank 16 on all
projections, and a batch of 4 x 2048 tokens. Each runs in a process of its own. *Explain* is the
call alone, *all* has the imports and the making of the model too.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from typing import Any

import torch

#: By name: width, inner width, layers, heads.
MODELS = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 80, 64)}


def main() -> None:
    """Explain the models that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description="Seconds and memory of explain.")
    parser.add_argument("models", nargs="*", help=f"of {', '.join(MODELS)}; all if none")
    parser.add_argument("--device", default="h100", help="the device to plan for")
    given = parser.parse_args()
    print("| model | sites changed | explain, s | CPU, s | all, s | peak, GiB |")
    print("|---|---|---|---|---|---|", flush=True)
    for name in given.models or MODELS:
        process = multiprocessing.get_context("spawn").Process(
            target=explained, args=(name, given.device, time.time())
        )
        process.start()
        process.join()


def explained(name: str, device: str, started: float) -> None:
    """Explain one model, and print its row."""
    import runlora_fx

    model, tokens = model_of(*MODELS[name])
    wall, cpu = time.perf_counter(), time.process_time()
    report = runlora_fx.explain(model, input_ids=tokens, labels=tokens, device=device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    changed = sum(site.changed for site in report.sites)
    every = time.time() - started
    print(
        f"| {name} | {changed} of {len(report.sites)} | {wall:.0f} | {cpu:.0f} | {every:.0f} "
        f"| {peak:.2f} |",
        flush=True,
    )


def model_of(width: int, inner: int, layers: int, heads: int) -> tuple[Any, torch.Tensor]:
    """A model with adapters and a batch, on the meta device, in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from runlora_fx.cli.without_weights import on_meta

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        use_cache=False,
    )
    lora = LoraConfig(r=16, target_modules="all-linear")
    with on_meta(torch.bfloat16):
        base = LlamaForCausalLM(config)
        model = get_peft_model(base, lora, autocast_adapter_dtype=False)
        tokens = torch.empty(4, 2048, dtype=torch.long)
    return model.train(), tokens


if __name__ == "__main__":
    main()
