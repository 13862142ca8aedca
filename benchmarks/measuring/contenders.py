"""Contenders: who is timed against whom.

    contenders(BASELINE, ...)      by name, and why the others are left out

Invariant: a contender that cannot run here is named with the reason, and never left out silently.
"""

from __future__ import annotations

from typing import Any

from measuring.inference import merged, tabled
from measuring.libraries import (
    axolotl,
    contender,
    lorafusion,
    loralib,
    run_lora_run,
    torchtune,
    unsloth,
)
from measuring.steps import Contender

BASELINE = "PEFT + Inductor"
EAGER = "PEFT, eager"
FROZEN = "frozen, Inductor"
OURS = "runlora"


def ours(**options: Any) -> Contender:
    """A contender with our backend."""
    return Contender("runlora", {f"runlora.{name}": value for name, value in options.items()})


AUTOTUNED = {"max_autotune": True}

#: A budget that holds every merged weight.
FAST = ours(memory="fast", memory_budget=1 << 40)

#: The layer as PEFT has it, and under both backends.
FUNCTIONS: dict[str, Contender] = {
    EAGER: Contender(None),
    BASELINE: Contender("inductor"),
    OURS: ours(),
}

#: Ours under each policy (plain is "balanced"), PEFT, and the floor.
RECIPES: dict[str, Contender] = {
    FROZEN: Contender("inductor", is_adapted=False),
    **FUNCTIONS,
    'runlora, memory="low"': ours(memory="low"),
    'runlora, memory="fast"': FAST,
}

#: Products are tuned, CUDA graphs are not used.
TUNED: dict[str, Contender] = {
    BASELINE: Contender("inductor"),
    "PEFT + Inductor, max-autotune": Contender("inductor", AUTOTUNED),
    OURS: ours(),
    "runlora, max-autotune": Contender("runlora", AUTOTUNED),
}

#: What runs if it is asked for, in every set: most of it takes minutes to compile.
ON_REQUEST: dict[str, Contender] = {
    **{name: tuned for name, tuned in TUNED.items() if tuned.options == AUTOTUNED},
    "runlora, upcast=False": ours(upcast=False),
    'runlora, tune="shapes"': ours(tune="shapes"),
    'runlora, tune="plans"': ours(tune="plans"),
}

#: Merged weights that are kept from call to call, and weights that PEFT has merged for good.
INFERENCE: dict[str, Contender] = {
    FROZEN: Contender("inductor", is_adapted=False),
    **FUNCTIONS,
    "runlora, merged and kept": ours(memory="fast", memory_budget=1 << 40, reuse=True),
    "merged by PEFT, Inductor": Contender("inductor", convert=merged),
}

#: Samples with adapters of their own: by their names as in PEFT, and from tables, ``A[k]``.
MIXED: dict[str, Contender] = {
    FROZEN: Contender("inductor", is_adapted=False),
    **FUNCTIONS,
    "A[k], Inductor": Contender("inductor", convert=tabled),
    "A[k], runlora": Contender("runlora", convert=tabled),
}


def others() -> tuple[dict[str, Contender], dict[str, str]]:
    """Other libraries' layers: those that can be imported, and why the rest is left out."""
    found = {
        "torchtune + Inductor": contender(torchtune, "inductor"),
        "loralib + Inductor": contender(loralib, "inductor"),
        'the paper\'s package "runlora", eager': contender(run_lora_run, None),
        "Unsloth's LoRA_W": contender(unsloth, None),
        "axolotl's LoRA_O": contender(axolotl, None),
        "LoRAFusion's fused_linear_lora": contender(lorafusion, None),
    }
    known = {name: made for name, made in found.items() if isinstance(made, Contender)}
    return known, {name: why for name, why in found.items() if isinstance(why, str)}
