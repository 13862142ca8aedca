"""Several adapters: switch between them, and swap files of adapters without compiling again.

Run it with ``python examples/several_adapters.py``; needs ``pip install '.[demo]'``.
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from torch import Tensor, nn
from torch._dynamo.utils import counters

BACKEND = "runlora_eager"  # traced like "runlora"; operators run one by one


def adapted(rank: int, seed: int) -> PeftModel:
    """The same layers for every seed, with an adapter that differs."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64))
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])
    model = get_peft_model(layers, config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.02)
    return model.eval()


def graphs() -> int:
    """How many graphs were compiled so far."""
    return int(counters["stats"]["unique_graphs"])


@torch.no_grad()
def switch(x: Tensor) -> None:
    """Adapters side by side: each is compiled when it is first active."""
    model = adapted(rank=4, seed=1)
    model.add_adapter("second", LoraConfig(r=8, target_modules=["0", "2"]))
    model.compile(backend=BACKEND)
    for name in ("default", "second", "default"):
        model.set_adapter(name)
        print(f"{name}: sum {model(x).sum():.3f}, graphs {graphs()}")


@torch.no_grad()
def hot_swap(x: Tensor, folder: Path) -> None:
    """One slot, whose weights are replaced: ranks are padded to the highest."""
    for seed, rank in ((1, 4), (2, 8), (3, 2)):
        adapted(rank, seed).save_pretrained(str(folder / str(seed)))
    model = adapted(rank=4, seed=1)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    model.compile(backend=BACKEND)
    before = graphs()
    for seed in (1, 2, 3):
        hotswap_adapter(model, str(folder / str(seed)), adapter_name="default", torch_device="cpu")
        expected = adapted(rank={1: 4, 2: 8, 3: 2}[seed], seed=seed)(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    print(f"three files of adapters, graphs compiled: {graphs() - before}")


def main() -> None:
    """Both ways."""
    x = torch.randn(256, 64)
    switch(x)
    with tempfile.TemporaryDirectory() as folder:
        hot_swap(x, Path(folder))


if __name__ == "__main__":
    main()
