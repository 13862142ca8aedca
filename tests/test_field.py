"""`benchmarks/field.py` at its smallest, with backends that need no compiler."""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CASE = "llama-250m, rank 128, bf16"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, with small models and contenders that compile in moments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import field
    from measuring import contenders, models
    from measuring.steps import Contender

    quick = {
        contenders.FROZEN: Contender(None, is_adapted=False),
        contenders.BASELINE: Contender(None),
        contenders.OURS: Contender("runlora_eager", {"runlora.strict": True}),
    }
    small = {"width": 64, "inner": 128, "heads": 4, "rank": 8, "rows": 2, "length": 16}
    cuts = {name: replace(cut, layers=1, **small) for name, cut in models.PAPER.items()}
    monkeypatch.setattr(models, "PAPER", cuts)
    monkeypatch.setattr(contenders, "RECIPES", quick)
    monkeypatch.setattr(contenders, "INFERENCE", quick)
    monkeypatch.setattr(field, "shares", lambda task: {"flops": 0.5, "bytes": 0.25})
    monkeypatch.setattr(contenders, "others", lambda: ({}, {"other": "other is not installed"}))
    yield field
    for name in list(sys.modules):
        if name == "field" or name.startswith("measuring"):
            sys.modules.pop(name)


def run(bench: Any, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Its exit status, its JSON and its Markdown."""
    status = bench.main([*arguments, "--device", "cpu", "--rounds", "6", "--out", str(out)])
    file = out / f"field_{arguments[0]}.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    return status, found, file.with_suffix(".md").read_text(encoding="utf-8")


def test_a_set_is_compared_timed_and_written(bench: Any, tmp_path: Path) -> None:
    status, found, text = run(bench, tmp_path, "paper", CASE)
    assert status == 0, text
    (case,) = found["cases"]
    rows = case["contenders"]
    assert list(rows) == ["frozen, Inductor", "PEFT + Inductor", "runlora"]
    for row in rows.values():
        assert row["median_s"] == median(row["times_s"]) > 0
        assert row["kept_B"] > 0 and row["peak_B"] > 0
    assert rows["runlora"]["error"] > 0  # against eager PEFT in float32
    assert "error" not in rows["frozen, Inductor"]
    assert rows["frozen, Inductor"]["kept_B"] < rows["PEFT + Inductor"]["kept_B"]
    assert "tax_removed" in rows["runlora"]
    assert case["recompiled"] == 0
    assert "removes 50% of the FLOPs" in text and "removes 25% of the bytes" in text
    assert "1 of 24 layers" in text
    assert "Not run: other: other is not installed." in text
    assert found["machine"]["commit"] in text


@pytest.mark.slow
def test_shares_are_counted(bench: ModuleType) -> None:
    """With many tokens the plan with fewest FLOPs removes most of what adapters add."""
    import torch
    from measuring import models
    from measuring.shares import shares

    cut = replace(models.PAPER[CASE], length=256)
    found = shares(models.task_of(cut, torch.device("cpu")))
    assert 0.3 < found["flops"] < 1
    assert 0 <= found["bytes"] < 1


def test_cases_that_are_not_asked_for_keep_their_results(bench: Any, tmp_path: Path) -> None:
    other = "ViT-base, rank 32, fp32"
    _, first, _ = run(bench, tmp_path, "paper", CASE)
    _, both, _ = run(bench, tmp_path, "paper", other)
    assert [case["case"] for case in both["cases"]] == [CASE, other]
    assert both["cases"][0] == first["cases"][0]


def test_results_of_another_machine_are_not_kept(bench: Any, tmp_path: Path) -> None:
    """Nor those of another version or commit."""
    _, first, _ = run(bench, tmp_path, "inference", "decode", "--scale", "64")
    first["machine"]["device"] = "another"
    (tmp_path / "field_inference.json").write_text(json.dumps(first), encoding="utf-8")
    _, found, _ = run(bench, tmp_path, "inference", "prefill", "--scale", "64")
    assert [case["case"] for case in found["cases"]] == ["prefill"]


def test_a_failure_is_written_and_the_rest_still_runs(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from measuring import models

    broken = replace(models.PAPER[CASE], kind="no such model")
    monkeypatch.setitem(models.PAPER, CASE, broken)
    status, found, text = run(bench, tmp_path, "paper", CASE, "ViT-base, rank 32, fp32")
    assert status == 1
    assert found["cases"][0]["refused"] == "KeyError: 'no such model'"
    assert "contenders" in found["cases"][1]
    assert "**Refused**, no times: KeyError" in text


@pytest.mark.parametrize("library", ("torchtune", "loralib"))
def test_another_library_computes_the_same(bench: ModuleType, library: str) -> None:
    pytest.importorskip("torchao")
    import torch
    from measuring import compare, libraries, models
    from measuring.contenders import BASELINE
    from measuring.steps import Contender, Step

    module = pytest.importorskip(f"measuring.libraries.{library}")
    known = libraries.contender(module, None)
    if isinstance(known, str):
        pytest.skip(known)
    task = models.task_of(models.PAPER["opt-350m, rank 128, bf16"], torch.device("cpu"))
    task = task.exact(torch.float32)
    values = {n: Step(c, task).values() for n, c in {BASELINE: Contender(None), "x": known}.items()}
    assert len(values["x"]) == len(values[BASELINE]) == 2 + 2 * 6
    assert compare.compared(task, values)["x"] < 1e-5


def test_an_interval_contains_the_median_as_often_as_it_says(bench: ModuleType) -> None:
    """Of 2,000 samples of 20 values, whose true median is 0."""
    from measuring.turns import Ratio

    rng = random.Random(0)
    inside = 0
    for _ in range(2000):
        found = Ratio.of([rng.gauss(0, 1) for _ in range(20)], [1.0] * 20)
        assert found.least <= found.low <= found.median <= found.high <= found.most
        inside += found.low <= 0 <= found.high
    assert 0.94 < inside / 2000 < 0.98  # binomial: 95.9%


def test_too_few_rounds_have_the_widest_interval(bench: ModuleType) -> None:
    from measuring.turns import Ratio

    found = Ratio.of([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert (found.low, found.high) == (found.least, found.most) == (1.0, 3.0)
