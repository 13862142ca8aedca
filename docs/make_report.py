"""The report in docs/reading-a-report.md: of a small Llama on the meta device, planned for an H100.

    python docs/make_report.py

writes what ``print(report)`` shows between the marks of the page. Nothing is run; the time of
planning is measured on this machine. Needs PEFT and transformers.
"""

from __future__ import annotations

import re
from pathlib import Path

import peft
import torch
import transformers

import runlora_fx

PAGE = Path(__file__).parent / "reading-a-report.md"

#: The adapted projections, and the one that has dropout besides.
PROJECTIONS = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
DROPPED = "model.layers.2.self_attn.q_proj"


def report() -> runlora_fx.Report:
    """The report that the page explains."""
    config = transformers.LlamaConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=256,
        use_cache=False,
    )
    lora = peft.LoraConfig(r=32, target_modules=PROJECTIONS, task_type="CAUSAL_LM")
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, lora)
        model.get_submodule(f"base_model.model.{DROPPED}").lora_dropout["default"] = (
            torch.nn.Dropout(0.05)
        )
        tokens = torch.empty(4, 64, dtype=torch.long)
    return runlora_fx.explain(model.train(), input_ids=tokens, labels=tokens, device="h100")


def main() -> None:
    """Put the report in the page."""
    page = PAGE.read_text(encoding="utf-8")
    shown = f"```\n{report()}```"
    pattern = r"(<!-- report -->\n).*?(\n<!-- end -->)"
    page, count = re.subn(pattern, lambda at: f"{at[1]}{shown}{at[2]}", page, flags=re.DOTALL)
    assert count == 1, f"{PAGE} has no mark <!-- report -->"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
