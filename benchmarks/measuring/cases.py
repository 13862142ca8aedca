"""Cases: what each set of `benchmarks/field.py` runs.

    SETS["recipes"](8)["DoRA"].make(device)

Invariant: a case says how its model was cut or scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch

from measuring import contenders, inference, methods, models, recipes
from measuring.quantised import nf4_model_of
from measuring.steps import Contender, Task
from runlora_fx.cli.layers import Recipe, model_of


class Case(NamedTuple):
    """A case: what is said of it, what makes its task, and who runs it."""

    about: str
    make: Callable[[torch.device], Task]
    contenders: Mapping[str, Contender]


RECIPES: dict[str, Recipe] = {
    "no dropout": Recipe(),
    "dropout 0.05": Recipe(dropout=0.05),
    "autocast, fp32 adapters": Recipe(autocast=True),
    "autocast, dropout 0.05": Recipe(autocast=True, dropout=0.05),
    "rank 8": Recipe(rank=8),
    "DoRA": Recipe(dora=True),
    "QLoRA": Recipe(quantised=True),
    "QLoRA, bitsandbytes": Recipe(),
    "checkpointing": Recipe(checkpointed=True),
    "MoE": Recipe(shape="Mixtral-8x7B"),
    # The shape of https://github.com/huggingface/peft/pull/3577.
    "MoE, 128 experts": Recipe(shape="Qwen3-30B-A3B", rows=2),
}

#: Who makes the layer, if not ``model_of``.
MAKERS: dict[str, recipes.Make] = {"QLoRA, bitsandbytes": nf4_model_of}

#: What a recipe does not say.
NOTES = {
    "QLoRA": ", 4-bit weights that the graph dequantises, as HQQ's",
    "QLoRA, bitsandbytes": ", NF4 weights of bitsandbytes",
    "MoE": ", 8 experts of which a token picks 2",
    "MoE, 128 experts": ", 128 experts of which a token picks 8",
}

Set = Iterator[tuple[str, Case]]


def paper(scale: int, tokens: int | None = None) -> Set:
    """The paper's models, which are cut and not scaled; further if not all tokens are wanted."""
    known = contenders.RECIPES | contenders.others()[0]
    for name, known_cut in models.PAPER.items():
        cut = known_cut if tokens is None else known_cut.shortened(tokens)
        yield name, Case(cut.about, partial(models.task_of, cut), known)


def trained(scale: int, tokens: int | None = None) -> Set:
    """A layer as people train it."""
    for name, recipe in RECIPES.items():
        make = MAKERS.get(name, model_of)
        task = partial(recipes.task_of, recipe, scale, make=make)
        about = recipes.about(recipe, scale) + NOTES.get(name, "")
        yield name, Case(about, task, contenders.RECIPES)


def applied(scale: int, tokens: int | None = None) -> Set:
    """A layer without gradients."""
    for name, batch in inference.BATCHES.items():
        known = contenders.MIXED if batch.is_mixed else contenders.INFERENCE
        yield name, Case(batch.about(scale), partial(inference.task, batch, scale), known)


def other(scale: int, tokens: int | None = None) -> Set:
    """Other training methods, and steps of optimizers."""
    for name, method in methods.METHODS.items():
        known = contenders.RECIPES if method.is_model else contenders.FUNCTIONS
        yield name, Case(method.about(scale), partial(method.make, scale), known)


SETS: dict[str, Callable[[int, int | None], Set]] = {
    "paper": paper,
    "recipes": trained,
    "inference": applied,
    "methods": other,
}
