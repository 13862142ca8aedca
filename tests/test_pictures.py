"""The worked example of docs/pictures.md, the rule of docs/will-i-gain.md, and the drawn files."""

import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

import runlora_fx

ROOT = Path(__file__).parent.parent
CONSTRAINTS = (ROOT / "constraints.txt").read_text("utf-8")
#: The first pin of a package is that of the newest Python.
PINS = dict(reversed(re.findall(r"^([\w-]+)==([^;\s]+)", CONSTRAINTS, re.M)))

pytest.importorskip("matplotlib", reason="matplotlib not installed: pip install '.[docs]'")


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """The script that draws; it does not draw when it is imported."""
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "make_pictures.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def table() -> dict[str, tuple[str, str]]:
    """The numbers of the worked example, by row: as written, and as it runs."""
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|([^|]+)\|([^|]*)\|([^|]*)\|$", text, re.MULTILINE)
    return {name.strip(): (before.strip(), after.strip()) for name, before, after in rows}


def gflop(text: str) -> float:
    """The value of sums of products such as `8.590 + 2 x 0.537` [GFLOP]."""
    addends = [re.fullmatch(r"(?:(\d) x )?([\d.]+)", part) for part in text.split(" + ") if part]
    return sum(int(found[1] or 1) * float(found[2]) for found in addends)


def test_the_worked_example_is_what_the_package_reports(pictures: ModuleType) -> None:
    site = pictures.site_of(pictures.EXAMPLE)
    rows = table()
    totals = rows["all products"]
    assert totals == (f"{site.flops_before / 1e9:.3f}", f"{site.flops_after / 1e9:.3f}")
    # Each number of a row is one product: base, adapter, or B A.
    n, i, o, r = pictures.EXAMPLE.tokens, 1024, 1024, 64
    assert (pictures.EXAMPLE.inputs, pictures.EXAMPLE.outputs, pictures.EXAMPLE.rank) == (i, o, r)
    products = {f"{2 * m * k * p / 1e9:.3f}" for m, k, p in ((n, i, o), (n, i, r), (o, r, i))}
    steps = [row for name, row in rows.items() if name.startswith("`")]
    assert len(steps) == 5
    for column, total in enumerate(totals):
        cells = [step[column] for step in steps]
        assert {x for cell in cells for x in re.findall(r"\d\.\d+", cell)} <= products
        assert sum(map(gflop, cells)) == pytest.approx(float(total), abs=0.003)
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    assert f"before  {site.flops_before_expr}" in text
    assert f"after   {site.flops_after_expr}" in text
    saved = 100 * (1 - site.flops_after / site.flops_before)
    assert f"That is {saved:.1f}% fewer FLOPs" in text
    assert len(pictures.calls(pictures.forward_graphs(pictures.EXAMPLE)[0])) == 8  # "eight nodes"


@pytest.mark.parametrize(("i", "o", "r"), [(256, 256, 16), (512, 128, 8), (128, 512, 8)])
def test_the_rule_of_thumb_is_what_the_search_finds(
    pictures: ModuleType, i: int, o: int, r: int
) -> None:
    """In training the forward merges for N > i, the backward for N > o."""
    for width, line in ((i, r"^Y = X (M'|\()"), (o, r"^dX = dY (M$|\()")):
        for tokens, merges in ((width - 64, False), (width + 64, True)):
            site = pictures.site_of(pictures.Sizes(tokens, i, o, r))
            assert bool(re.search(line, site.after, re.MULTILINE)) == merges, (tokens, site.after)


@pytest.mark.parametrize(("i", "o"), [(256, 256), (512, 128)])
def test_the_rule_of_thumb_for_inference(pictures: ModuleType, i: int, o: int) -> None:
    border = i * o // (i + o)
    for tokens, merges in ((border - 16, False), (border + 16, True)):
        sizes = pictures.Sizes(tokens, i, o, 8)
        with torch.no_grad():
            report = runlora_fx.explain(
                pictures.LoraLayer(sizes), pictures.inputs_of(sizes), objective="flops"
            )
        assert report.sites[0].changed == merges


def test_the_share_of_the_rule(pictures: ModuleType) -> None:
    d, r, n = 1024, 64, 4096
    site = pictures.site_of(pictures.Sizes(n, d, d, r))
    share = r * (1 - d / n) / (d + 3 * r)
    assert 1 - site.flops_after / site.flops_before == pytest.approx(share, rel=1e-12)
    text = (ROOT / "docs" / "will-i-gain.md").read_text(encoding="utf-8")
    for width, rank in ((4096, 16), (1024, 64)):
        most = 100 * rank / (width + 3 * rank)
        shown = re.search(rf"d = {width} and r = {rank} that is at most ([\d.]+)%", text)
        shown = shown or re.search(rf"d = {width} and r = {rank} at most ([\d.]+)%", text)
        assert shown is not None
        assert float(shown[1]) >= most > float(shown[1]) - 0.1


def test_predicted_numbers_of_the_page(pictures: ModuleType) -> None:
    """By published rates, so they are the same on every machine."""
    sizes = pictures.Sizes(8192, 4096, 4096, 16)
    layer = pictures.LoraLayer(sizes).to(torch.bfloat16)
    x = pictures.inputs_of(sizes).detach().to(torch.bfloat16).requires_grad_()
    report = runlora_fx.explain(layer, x, device="h100")
    text = (ROOT / "docs" / "will-i-gain.md").read_text(encoding="utf-8")
    assert "8.9% less time of matrix products" in report.verdict
    assert "8.9% less time of matrix products is predicted for an H100" in text
    assert report.sites[0].break_even == "when N > 3648"
    assert "merging the adapter pays: when N > 3648" in text


@pytest.mark.skipif(
    any(version(name).split("+")[0] != PINS[name] for name in ("matplotlib", "torch")),
    reason="other versions of matplotlib or torch than the pinned ones draw other files",
)
def test_the_pictures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    script = ROOT / "docs" / "make_pictures.py"
    # "break-even" has 36 reports: the tests above check its rule.
    names = ["layer", "stages", "traffic", "rooms"]
    subprocess.run([sys.executable, script, "--out", tmp_path, *names], check=True, timeout=600)
    drawn = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    assert set(drawn) == {f"{name}.svg" for name in names}
    kept = {path.name: path.read_text("utf-8") for path in (ROOT / "docs" / "images").glob("*.svg")}
    assert set(kept) == {*drawn, "break-even.svg"}
    assert [name for name, text in drawn.items() if kept[name] != text] == []
