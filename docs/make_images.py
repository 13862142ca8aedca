"""The images of docs/report-html.md: a report's page in a browser, in both colour schemes.

    python docs/make_images.py

The page is that of two layers of Llama-3-8B with adapters of rank 16 on all projections, planned
for an H100. The model is on the meta device, so it takes no memory, and nothing is measured. Needs
playwright (the extra ``docs``), a Chromium, Pillow, PEFT and transformers.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
import transformers
from PIL import Image
from playwright.sync_api import sync_playwright

import runlora_fx

WIDTH, HEIGHT = 1280, 960

#: The browsers that are looked for before playwright's own.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def report() -> runlora_fx.Report:
    """The report that the images show."""
    config = transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        num_hidden_layers=2,
        vocab_size=128256,
        use_cache=False,
    )
    lora = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
        tokens = torch.empty(4, 2048, dtype=torch.long)
    return runlora_fx.explain(model.train(), input_ids=tokens, labels=tokens, device="h100")


def draw(page: Path, folder: Path) -> None:
    """Write an image of the first screen of a page in each colour scheme.

    Args:
        page: The page.
        folder: Where the images go.
    """
    browser_path = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            shown = browser.new_page(
                viewport={"width": WIDTH, "height": HEIGHT}, color_scheme=scheme
            )
            shown.goto(page.as_uri())
            shown.screenshot(path=folder / f"report-{scheme}.png")
            # The drawings and plots of the first kind of site.
            shown.locator("details.kind").first.screenshot(
                path=folder / f"report-kind-{scheme}.png"
            )
        browser.close()
    for file in folder.glob("report-*.png"):  # a palette makes small files
        image = Image.open(file).convert("RGB")
        image.quantize(256, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


def main() -> None:
    """Make the report, and draw it."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "images"
    parser.add_argument("--out", type=Path, default=default, help="folder of the images")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary:
        page = Path(temporary) / "report.html"
        page.write_text(report().to_html(), encoding="utf-8")
        draw(page, folder)


if __name__ == "__main__":
    main()
