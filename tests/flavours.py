"""A registry of LoRA flavours: what a rewritten training is compared on.

A new flavour is one entry in `FLAVOURS`; it inherits every test that runs over the registry, and a
row of the table that `benchmarks/flavours.py` writes. Most models have two blocks
``x + down(gelu(up(norm(x))))`` of widths 64 and 96, and 200 tokens: more than in * out / (in +
out), so that merging W + s B A pays. Methods without a maintained package come from
`examples/flavours`.
"""

import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mixtures
import torch
from market import MODELS, randomise_lora_b
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    VeraConfig,
    XLoraConfig,
    get_peft_model,
)
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor, nn
from trainings import Batch, Flavour, own_loss
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

sys.path.append(str(Path(__file__).parent.parent / "examples" / "flavours"))

from copra import CopraLinear, draw
from flat_lora import perturbed
from geolora import GeoLoraLinear
from lora_xs import LoraXsLinear
from molora import MoLoraLinear
from relora import merge_and_restart
from reslora import ResLoraLinear, Shortcut

HIDDEN, FFN, BLOCKS, TOKENS, RANK = 64, 96, 2, 200, 8
TARGETS = ["up", "down"]


class Block(nn.Module):
    """``x + down(gelu(up(norm(x))))``."""

    def __init__(self, ffn: int = FFN) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN, elementwise_affine=False)
        self.up, self.down = nn.Linear(HIDDEN, ffn), nn.Linear(ffn, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def base(blocks: int = BLOCKS, ffn: int = FFN) -> nn.Sequential:
    """The model without adapters."""
    return nn.Sequential(*(Block(ffn) for _ in range(blocks)))


def tokens(dtype: torch.dtype = torch.float32, width: int = HIDDEN) -> Batch:
    """Activations for a model, and what it should make of them."""
    generator = torch.Generator().manual_seed(1)
    x, target = (torch.randn(2, TOKENS // 2, width, generator=generator) for _ in range(2))
    return {"input": x.to(dtype), "target": target}


def peft(
    dtype: torch.dtype = torch.float32, rank: int = RANK, blocks: int = BLOCKS, **config: Any
) -> PeftModel:
    """The model with PEFT's adapters, as they are after some training: B is not zero."""
    lora = LoraConfig(**{"r": rank, "lora_alpha": 16, "target_modules": TARGETS, **config})
    model = get_peft_model(base(blocks).to(dtype), lora)
    if "init_lora_weights" not in config:
        randomise_lora_b(model)
    return model.train()


def replaced(make: Callable[[nn.Linear], nn.Module], model: nn.Module | None = None) -> nn.Module:
    """The model with `up` and `down` of every block replaced; nothing of the base trains."""
    model = (base() if model is None else model).requires_grad_(False)
    for block in list(model.modules()):
        if isinstance(block, Block):
            block.up, block.down = make(block.up), make(block.down)
    return model.train()


# --- models from libraries


def two_adapters() -> nn.Module:
    """Two adapters of different rank, both active."""
    model = peft()
    model.add_adapter("second", LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    randomise_lora_b(model)
    model.base_model.set_adapter(["default", "second"])
    return model


def lora_and_base() -> nn.Module:
    """LoRA while the base weights train as well."""
    model = peft()
    return model.requires_grad_(True)


def vera() -> nn.Module:
    config = VeraConfig(r=RANK, target_modules=TARGETS, d_initial=0.1)
    model = get_peft_model(base(), config)
    for name, weight in model.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(weight, std=0.5)
    return model.train()


def ia3() -> nn.Module:
    config = IA3Config(target_modules=TARGETS, feedforward_modules=["down"])
    return get_peft_model(base(), config).train()


class WithLoss(nn.Module):
    """A model that returns its loss, as those of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = base()

    def forward(self, input: Tensor, labels: Tensor) -> CausalLMOutput:
        logits = self.layers(input)
        return CausalLMOutput(loss=(logits - labels).square().mean(), logits=logits)


def adalora() -> nn.Module:
    config = AdaLoraConfig(
        init_r=12, target_r=4, tinit=0, tfinal=0, deltaT=1, total_step=4, target_modules=TARGETS
    )
    model = get_peft_model(WithLoss(), config)
    for name, weight in model.named_parameters():
        if "lora_E" in name:  # zero at first; PEFT gives the other factors a deviation of 0.02
            nn.init.normal_(weight)
    return model.train()


def update_ranks(model: nn.Module, _: Any, step: int) -> None:
    """Cut AdaLoRA's ranks, as a training loop does after every step."""
    model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]


def xlora() -> nn.Module:
    """Two saved LoRA experts in a Llama, mixed by a classifier; everything but the base trains."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in (0, 1):
            torch.manual_seed(seed)
            lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=["q_proj", "down_proj"])
            model = get_peft_model(small_llama(), lora)
            randomise_lora_b(model)
            model.save_pretrained(f"{folder}/{seed}")
        config = XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=HIDDEN,
            adapters={name: f"{folder}/{name}" for name in ("0", "1")},  # PEFT's own names
            use_trainable_adapters=True,
        )
        torch.manual_seed(0)
        return get_peft_model(small_llama(), config).train()


def small_llama() -> nn.Module:
    """The market's Llama with one layer."""
    model = MODELS["llama"].base()
    model.model.layers = model.model.layers[:1]
    return model


def embedding() -> nn.Module:
    model = nn.Sequential(OrderedDict(table=nn.Embedding(50, HIDDEN), block=Block()))
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=["table"])
    model = get_peft_model(model, lora)
    for name, weight in model.named_parameters():
        if "lora_embedding" in name:
            nn.init.normal_(weight, std=0.1)
    return model.train()


def indices() -> Batch:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(50, (2, TOKENS // 2), generator=generator)
    return {"input": found, "target": tokens()["target"]}


def convolution() -> nn.Module:
    layers = OrderedDict(first=nn.Conv2d(3, 16, 3, padding=1), last=nn.Conv2d(16, 4, 3))
    lora = LoraConfig(r=4, lora_alpha=4, target_modules=["first", "last"])
    model = get_peft_model(nn.Sequential(layers), lora)
    randomise_lora_b(model)
    return model.train()


def images() -> Batch:
    generator = torch.Generator().manual_seed(1)
    shapes = {"input": (2, 3, 12, 12), "target": (2, 4, 10, 10)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def conv1d() -> nn.Module:
    """GPT-2's layer, which stores W as (in, out)."""
    model = replaced(lambda linear: Conv1D(linear.out_features, linear.in_features))
    lora = LoraConfig(r=RANK, lora_alpha=16, target_modules=TARGETS, fan_in_fan_out=True)
    model = get_peft_model(model, lora)
    randomise_lora_b(model)
    return model.train()


def loralib_linear() -> nn.Module:
    import loralib

    return randomised(
        replaced(lambda x: loralib.Linear(x.in_features, x.out_features, r=RANK, lora_alpha=16)),
        "lora_B",
    )


def loralib_merged_linear() -> nn.Module:
    """One matrix for q, k and v; q and v are adapted."""
    import loralib

    layer = loralib.MergedLinear(
        HIDDEN, 3 * HIDDEN, r=RANK, lora_alpha=16, enable_lora=[True, False, True]
    )
    model = nn.Sequential(Block().requires_grad_(False), layer)
    return randomised(model, "lora_B").train()


TORCHAO_MOVED = {
    "torchao.dtypes.nf4tensor": "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"
}


def torchtune_linear(kind: str) -> nn.Module:
    # torchtune 0.6 looks for NF4 where torchao had it at the time.
    for old, new in TORCHAO_MOVED.items():
        if find_spec(old) is None:
            sys.modules[old] = import_module(new)
    from torchtune.modules import peft as torchtune

    layer = getattr(torchtune, kind)
    model = replaced(
        lambda x: layer(x.in_features, x.out_features, rank=RANK, alpha=16.0, use_bias=True)
    )
    randomised(model, "lora_b.weight")
    for module in model.modules():
        if isinstance(module, torchtune.DoRALinear):
            module.initialize_dora_magnitude()
    torchtune.set_trainable_params(model, torchtune.get_adapter_params(model))
    return model


# --- models from examples/flavours


def randomised(model: nn.Module, *names: str) -> nn.Module:
    """Random values for factors that start as zero: with zeros, half of the gradients vanish."""
    for name, weight in model.named_parameters():
        if name.endswith(names):
            nn.init.normal_(weight, std=0.02)
    return model


def lora_xs() -> nn.Module:
    return replaced(lambda linear: LoraXsLinear(linear, RANK, std=0.1))


def geolora() -> nn.Module:
    return replaced(lambda linear: GeoLoraLinear(linear, RANK))


def geolora_step(model: nn.Module, _: Any, step: int) -> None:
    for layer in model.modules():
        if isinstance(layer, GeoLoraLinear):
            layer.step(lr=0.02, tau=0.05)


def geolora_weights(model: nn.Module) -> dict[str, Tensor]:
    """What does not depend on the basis: the adapter's weights, and their ranks."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, GeoLoraLinear):
            found[f"{name} U S V'"] = layer.u @ layer.s @ layer.v.t()
            found[f"rank of {name}"] = torch.tensor(float(layer.rank))
    return found


def reslora(shortcut: Shortcut) -> nn.Module:
    """Blocks whose `up` and `down` know those of the block before."""
    model = base().requires_grad_(False)
    before: dict[str, ResLoraLinear | None] = dict.fromkeys(TARGETS)
    for block in model:
        for name in TARGETS:
            before[name] = ResLoraLinear(getattr(block, name), RANK, shortcut, before[name])
            setattr(block, name, before[name])
    return randomised(model, ".b")


def copra(as_flag: bool) -> nn.Module:
    return randomised(replaced(lambda x: CopraLinear(x, RANK, as_flag=as_flag)), ".b")


def drop(model: nn.Module, step: int) -> None:
    """The drops of a step; they become fewer."""
    draw(model, (0.25, 0.5, 1.0)[step], torch.Generator().manual_seed(step))


def molora() -> nn.Module:
    model = replaced(lambda linear: MoLoraLinear(linear, RANK, experts=3))
    return randomised(model, *(f"up.{i}.weight" for i in range(3)))


def restart(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    merge_and_restart(model, optimizer)


BFLOAT16 = 2.0**-8  # unit roundoff

FLAVOURS: dict[str, Flavour] = {
    # --- PEFT
    "LoRA": Flavour("PEFT; arXiv 2106.09685, equation (3)", peft, tokens, kernels=True),
    "rsLoRA": Flavour("PEFT; arXiv 2312.03732", lambda: peft(use_rslora=True), tokens),
    "PiSSA": Flavour("PEFT; arXiv 2404.02948", lambda: peft(init_lora_weights="pissa"), tokens),
    "OLoRA": Flavour("PEFT; arXiv 2406.01775", lambda: peft(init_lora_weights="olora"), tokens),
    "LoRA with dropout": Flavour(
        "PEFT",
        lambda: peft(lora_dropout=0.1),
        tokens,
        expects="alone",
        why="the adapter sees D(x), another tensor than the base layer: nothing to merge",
        kernels=True,
    ),
    "LoRA with bias in B": Flavour("PEFT, lora_bias", lambda: peft(lora_bias=True), tokens),
    "two active adapters": Flavour("PEFT", two_adapters, tokens),
    "LoRA and full training": Flavour("PEFT", lora_and_base, tokens),
    "LoRA-FA": Flavour(
        "PEFT, create_lorafa_optimizer; arXiv 2308.03303",
        peft,
        tokens,
        optimizer=lambda m: create_lorafa_optimizer(m, r=RANK, lora_alpha=16, lr=1e-3),
    ),
    "VeRA": Flavour(
        "PEFT; arXiv 2310.11454",
        vera,
        tokens,
    ),
    "AdaLoRA": Flavour(
        "PEFT, with its regularisation and rank updates; arXiv 2303.10512",
        adalora,
        lambda: {"input": tokens()["input"], "labels": tokens()["target"]},
        loss=own_loss,
        after=update_ranks,
    ),
    "DoRA": Flavour(
        "PEFT; arXiv 2402.09353", lambda: peft(use_dora=True), tokens, substituted=True
    ),
    "DoRA with dropout": Flavour(
        "PEFT",
        lambda: peft(use_dora=True, lora_dropout=0.1),
        tokens,
        kernels=True,
        substituted=True,
    ),
    "X-LoRA": Flavour(
        "PEFT; arXiv 2402.07148",
        xlora,
        MODELS["llama"].batch,
        loss=own_loss,
        expects="bytes",
        why="X A' and X for g X",
    ),
    "IA3": Flavour(
        "PEFT; arXiv 2205.05638",
        ia3,
        tokens,
        expects="alone",
        why="vectors scale activations: there is no low-rank product",
    ),
    "LoRA on Embedding": Flavour(
        "PEFT",
        embedding,
        indices,
        expects="alone",
        why="rows are gathered, and merging pays only where the table has fewer rows than tokens",
    ),
    "LoRA on Conv2d": Flavour("PEFT", convolution, images),
    "LoRA on Conv1D": Flavour("PEFT; GPT-2's transposed layer", conv1d, tokens),
    # --- other libraries
    "loralib.Linear": Flavour("loralib", loralib_linear, tokens, needs=("loralib",)),
    "loralib.MergedLinear": Flavour(
        "loralib",
        loralib_merged_linear,
        lambda: {
            "input": tokens()["input"],
            "target": tokens(width=3 * HIDDEN)["target"],
        },
        needs=("loralib",),
        substituted=True,
    ),
    "torchtune LoRALinear": Flavour(
        "torchtune", partial(torchtune_linear, "LoRALinear"), tokens, needs=("torchtune",)
    ),
    "torchtune DoRALinear": Flavour(
        "torchtune; arXiv 2402.09353",
        partial(torchtune_linear, "DoRALinear"),
        tokens,
        needs=("torchtune",),
    ),
    # --- dtypes
    "bf16 base, fp32 adapters, autocast": Flavour(
        "PEFT",
        partial(peft, torch.bfloat16),
        partial(tokens, torch.bfloat16),
        autocast=torch.bfloat16,
        rtol=4 * BFLOAT16,
    ),
    "bf16 base, fp32 adapters": Flavour(
        "PEFT",
        partial(peft, torch.bfloat16),
        partial(tokens, torch.bfloat16),
        expects="alone",
        why="the adapter runs in fp32, and casts are borders",
        rtol=4 * BFLOAT16,
    ),
    "bf16 base, fp32 adapters, relaxed": Flavour(
        "PEFT",
        partial(peft, torch.bfloat16),
        partial(tokens, torch.bfloat16),
        options={"numerics": "relaxed"},
        rtol=4 * BFLOAT16,
    ),
    # --- papers without a maintained package
    "LoRA-XS": Flavour("examples/flavours/lora_xs.py; arXiv 2405.17604", lora_xs, tokens),
    "GeoLoRA": Flavour(
        "examples/flavours/geolora.py; arXiv 2410.18720",
        geolora,
        tokens,
        optimizer=lambda model: None,
        after=geolora_step,
        compared=geolora_weights,
        rtol=5e-4,  # gradients are divided by small singular values
    ),
    "ResLoRA, input shortcut": Flavour(
        "examples/flavours/reslora.py; arXiv 2402.18039", partial(reslora, "input"), tokens
    ),
    "ResLoRA, block shortcut": Flavour(
        "examples/flavours/reslora.py; arXiv 2402.18039", partial(reslora, "block"), tokens
    ),
    "ResLoRA, middle shortcut": Flavour(
        "examples/flavours/reslora.py; arXiv 2402.18039",
        partial(reslora, "middle"),
        tokens,
        expects="alone",
        why="the sums of X A' over layers exist, and are multiplied by B as one",
    ),
    "XGBLoRA": Flavour(
        "examples/flavours/relora.py; arXiv 2410.19778",
        lambda: peft(rank=1),
        tokens,
        after=restart,
    ),
    "ReLoRA": Flavour("examples/flavours/relora.py; arXiv 2307.05695", peft, tokens, after=restart),
    "ReLoRA, merged weights kept": Flavour(
        "examples/flavours/relora.py; arXiv 2307.05695",
        peft,
        tokens,
        after=restart,
        options={"memory": "fast", "memory_budget": 4 * 4 * HIDDEN * FFN, "reuse": True},
    ),
    "CopRA, drops as tensors": Flavour(
        "examples/flavours/copra.py; arXiv 2410.22911", partial(copra, False), tokens, before=drop
    ),
    "CopRA, drops as flags": Flavour(
        "examples/flavours/copra.py; arXiv 2410.22911", partial(copra, True), tokens, before=drop
    ),
    "Flat-LoRA": Flavour(
        "examples/flavours/flat_lora.py; arXiv 2409.14396",
        peft,
        tokens,
        around=lambda model, step: perturbed(model, sigma=0.5, seed=step),
    ),
    "LoRA on expert weights, batched": Flavour(
        "PEFT, target_parameters",
        partial(mixtures.adapted, "qwen3-moe", "batched_mm"),
        mixtures.batch,
        loss=own_loss,
        substituted=True,
    ),
    "LoRA on expert weights, grouped": Flavour(
        "PEFT, target_parameters",
        partial(mixtures.adapted, "qwen3-moe", "grouped_mm"),
        mixtures.batch,
        loss=own_loss,
        substituted=True,
    ),
    "MoLoRA": Flavour(
        "examples/flavours/molora.py; arXiv 2309.05444",
        molora,
        tokens,
        expects="bytes",
        why="X A' for X A' B'",
    ),
}
