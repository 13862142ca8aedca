"""Training of the demo: eager PEFT, Inductor and runlora fine-tune the same model.

Example: ``train([variant_of(name, model) for name in BACKENDS], tokens, settings, ...)``.

Invariant: the variants start from identical weights and see identical batches. They take their
steps in turn in one process, so that other work on the machine affects all of them.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from runlora_fx.cli.console import progress
from runlora_fx.cli.demo_data import batches, corpus
from runlora_fx.cost_model.devices.peak import peak_bytes
from runlora_fx.cost_model.devices.registry import entry_of

BACKENDS = {"eager": None, "inductor": "inductor", "runlora": "runlora"}

# The first step compiles and the second one is measured for memory; neither is timed.
UNTIMED_STEPS = 2


@dataclass(frozen=True)
class Settings:
    """What to fine-tune and for how long.

    Attributes:
        model: Path or hub name of a causal language model; a small random Llama if None.
        rank: Rank of the adapters.
        batch: Sequences in a batch.
        seq: Tokens in a sequence.
        dtype: Of the base weights and the products: "float32" or "bfloat16".
        dropout: Probability of the dropout before the adapters.
        steps: Optimizer steps of each variant.
    """

    model: str | None = None
    rank: int = 32
    batch: int = 4
    seq: int = 256
    dtype: str = "float32"
    dropout: float = 0.0
    steps: int = 30

    def __post_init__(self) -> None:
        for name in ("rank", "batch", "seq"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.steps <= UNTIMED_STEPS:
            raise ValueError(f"steps must be more than {UNTIMED_STEPS}, got {self.steps}")


@dataclass
class Variant:
    """One way to run the training, and what it measured.

    Attributes:
        name: How the tables call it.
        model: The PEFT model, compiled in place unless it is the eager one.
        optimizer: Over the adapters alone.
        losses: Of every step.
        seconds: Of every timed step: forward, backward and optimizer.
        first_seconds: Of the first step, which compiles.
        saved_bytes: Kept between forward and backward, beyond parameters and inputs [B].
        peak_bytes: The most that a step holds at once, beyond what was held before it [B].
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    first_seconds: float = 0.0
    saved_bytes: int = 0
    peak_bytes: int = 0


def model_and_tokens(settings: Settings) -> tuple[nn.Module, Tensor]:
    """The PEFT model of the settings, in training mode, and the corpus in its tokens."""
    try:
        import peft
        import transformers
    except ImportError as error:
        message = "The demo needs PEFT and Transformers: pip install 'runlora-fx[demo]'"
        raise SystemExit(f"{message} ({error})") from None

    dtype = getattr(torch, settings.dtype)
    tokenizer = None
    if settings.model is None:
        config = transformers.LlamaConfig(
            vocab_size=256,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=3,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=settings.seq,
            # Wide enough that the frozen random head can tell bytes apart.
            initializer_range=0.05,
        )
        base = transformers.LlamaForCausalLM(config).to(dtype)
    else:
        try:
            base = transformers.AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype)
            tokenizer = transformers.AutoTokenizer.from_pretrained(settings.model)
        except (OSError, ValueError) as error:
            raise SystemExit(f"Cannot load --model {settings.model}: {error}") from None
    base.config.use_cache = False
    lora = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
    )
    model: nn.Module = peft.get_peft_model(base, lora).train()
    return model, corpus(tokenizer)


def variant_of(name: str, model: nn.Module) -> Variant:
    """A variant with a copy of the adapters; the frozen weights are shared, never copied."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    own: nn.Module = copy.deepcopy(model, frozen)
    if BACKENDS[name] is not None:
        own.compile(backend=BACKENDS[name], dynamic=False)
    adapters = [p for p in own.parameters() if p.requires_grad]
    return Variant(name, own, torch.optim.AdamW(adapters, lr=1e-3))


def train(
    variants: list[Variant],
    tokens: Tensor,
    settings: Settings,
    device: torch.device,
) -> None:
    """Take all steps of all variants, in turn, and fill in what they measured."""
    data = batches(tokens, settings.batch, settings.seq, seed=1)
    with progress() as bar:
        task = bar.add_task("", total=settings.steps * len(variants))
        for step in range(settings.steps):
            batch = next(data).to(device)
            # Each step begins with another variant, so that none always follows the same one.
            for offset in range(len(variants)):
                variant = variants[(step + offset) % len(variants)]
                doing = "training" if step else f"first step, {variant.name}"
                bar.update(task, description=doing, refresh=True)
                torch.manual_seed(step)
                _step(variant, batch, step, settings.dtype)
                bar.advance(task)


def _step(variant: Variant, batch: Tensor, step: int, dtype: str) -> None:
    """One optimizer step, measured for memory or timed if its number says so."""

    def take(watch: AbstractContextManager[Any]) -> None:
        with watch, torch.autocast(batch.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = variant.model(input_ids=batch, labels=batch).loss
        loss.backward()
        variant.optimizer.step()
        variant.optimizer.zero_grad()
        variant.losses.append(loss.item())

    if step == UNTIMED_STEPS - 1:
        variant.peak_bytes = peak_bytes(lambda: take(_count_saved(variant, batch)), batch.device)
        return
    entry_of(batch.device).synchronise(batch.device)
    start = time.perf_counter()
    take(nullcontext())
    entry_of(batch.device).synchronise(batch.device)
    seconds = time.perf_counter() - start
    if step == 0:
        variant.first_seconds = seconds
    else:
        variant.seconds.append(seconds)


@contextmanager
def _count_saved(variant: Variant, batch: Tensor) -> Iterator[None]:
    """Count the bytes that autograd saves inside the context, in eager or compiled code.

    A storage counts once and in full: it stays allocated while any view of it is saved.
    Parameters, buffers and inputs do not count, because they stay allocated without autograd.
    """
    lasting = [*variant.model.parameters(), *variant.model.buffers(), batch]
    known = {tensor.untyped_storage().data_ptr() for tensor in lasting}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield
    variant.saved_bytes = sum(saved.values())
