"""Demo: one LoRA fine-tuning run in eager PEFT, under Inductor and under runlora, side by side.

Example: `python -m runlora_fx demo --rank 128 --batch 8`.

Invariant: the exit status is 0 only if the losses of all compiled variants agree.
"""

from __future__ import annotations

import warnings

import torch

from runlora_fx import history
from runlora_fx.cli import demo_output as output
from runlora_fx.cli.console import results
from runlora_fx.cli.demo_training import BACKENDS, Settings, model_and_tokens, train, variant_of
from runlora_fx.report.data import combined

# Relative. Orders of evaluation round differently, and training amplifies it.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def run(settings: Settings) -> int:
    """Train, print the comparison, and check that all variants learnt the same.

    Args:
        settings: What to fine-tune and for how long.

    Returns:
        The exit status: 0, or 1 if the loss curves differ by more than rounding.
    """
    # Dynamo reads every attribute of a model, including deprecated ones.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", "dynamo_pgo force disabled")
    # Without caches, so that every graph is planned and there is a plan to show.
    torch.compiler.config.force_disable_caches = True
    console = results()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model, tokens = model_and_tokens(settings)
    console.print(output.headline(model, settings, device), soft_wrap=True)
    variants = [variant_of(name, model.to(device)) for name in BACKENDS]
    with history.collecting() as reports:
        train(variants, tokens, settings, device)

    # Inductor draws other dropout masks than eager mode, which is then no reference.
    reference = variants[0] if settings.dropout == 0 else variants[1]
    tolerance = TOLERANCE[settings.dtype]
    equal = output.print_losses(console, variants, reference, tolerance)
    output.print_costs(console, variants, device)
    console.print(f"\n{combined(reports)}", markup=False, soft_wrap=True)
    return 0 if equal else 1
