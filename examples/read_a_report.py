"""Read a report by a program: which layers were changed, what was gained, why others were not.

Run it with ``python examples/read_a_report.py``; needs ``pip install '.[demo]'``.
"""

import json

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import runlora_fx


def main() -> None:
    """Explain a network in which one layer gains and the other one cannot."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))
    model = get_peft_model(layers, LoraConfig(r=16, target_modules=["0", "2"]))
    # Dropout before the second adapter only, to see what a report says about it.
    model.get_base_model()[2].lora_dropout["default"] = nn.Dropout(0.1)

    report = runlora_fx.explain(model, torch.randn(1024, 256), objective="flops")
    print(report.verdict)
    for site in report:
        change = 100 * (site.flops_after / site.flops_before - 1)
        print(f"{site.modules[0]}: {site.shapes}: {'changed' if site.changed else 'left alone'}")
        print(f"  FLOPs {change:+.1f}%, {site.reason}")
        print(f"  FLOPs as a formula: {site.flops_before_expr} -> {site.flops_after_expr}")
        print(f"  merging pays {site.break_even or 'never'}")
        for cause in site.causes:
            print(f"  cause: {cause.name}; remedy: {cause.remedy}")
    for refusal in report.refusals:
        print(f"not read: {refusal}")

    # The same for programs that are not written in Python.
    content = json.loads(report.to_json())
    print("JSON:", ", ".join(content))


if __name__ == "__main__":
    main()
