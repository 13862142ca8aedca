"""`benchmarks/field.py` at its smallest, with backends that need no compiler."""

import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
CASE = "llama-250m, rank 128, bf16"
TUNED = 'runlora, tune="shapes"'


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The benchmark, with small models and contenders that compile in moments."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import field
    from measuring import contenders, inference, methods, models
    from measuring.steps import Contender

    quick = {
        contenders.FROZEN: Contender(None, is_adapted=False),
        contenders.BASELINE: Contender(None),
        contenders.OURS: Contender("runlora_eager", {"runlora.strict": True}),
    }
    small = {"width": 64, "inner": 128, "heads": 4, "rank": 8, "rows": 2, "length": 16}
    cuts = {name: replace(cut, layers=1, **small) for name, cut in models.PAPER.items()}
    monkeypatch.setattr(models, "PAPER", cuts)
    for name in ("ENCODER", "LLAMA"):
        monkeypatch.setattr(methods, name, replace(getattr(methods, name), layers=1, **small))
    for name in ("RECIPES", "INFERENCE", "FUNCTIONS"):
        monkeypatch.setattr(contenders, name, quick)
    table = Contender("runlora_eager", {"runlora.strict": True}, convert=inference.tabled)
    monkeypatch.setattr(contenders, "MIXED", {**quick, "A[k]": table})
    tuned = Contender("runlora_eager", contenders.ON_REQUEST[TUNED].options)
    monkeypatch.setattr(contenders, "ON_REQUEST", {TUNED: tuned})
    monkeypatch.setattr(field, "shares", lambda task: {"flops": 0.5, "bytes": 0.25})
    monkeypatch.setattr(contenders, "others", lambda: ({}, {"other": "other is not installed"}))
    yield field
    for name in list(sys.modules):
        if name == "field" or name.startswith("measuring"):
            sys.modules.pop(name)


def run(bench: Any, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Its exit status, its JSON and its Markdown."""
    status = bench.main(["--device", "cpu", "--rounds", "6", "--out", str(out), *arguments])
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


SLOW_CASES = (
    ("recipes", "QLoRA, bitsandbytes", 7),
    ("recipes", "MoE", 6),
    ("recipes", "MoE, 128 experts", 6),
    ("inference", "decode, mixed batch", 7),
    ("methods", "siamese encoder", 6),
    ("methods", "ReLoRA", 7),
    ("methods", "LoRA-Pro", 7),
)


@pytest.mark.parametrize(
    ("cases", "case", "sites"),
    (
        ("methods", "Flora, accumulation", 2),
        ("methods", "Flora, momentum", 7),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES),
    ),
)
def test_contenders_of_a_case_compute_the_same(
    bench: Any, tmp_path: Path, cases: str, case: str, sites: int
) -> None:
    """And what there is for plans to find, they find."""
    given = (cases, case, "--scale", "32", "--rounds", "1")
    status, found, text = run(bench, tmp_path, *given)
    assert status == 0, text
    rows = found["cases"][0]["contenders"]
    assert len(rows) >= 3
    assert rows["A[k]" if "mixed" in case else "runlora"]["sites"] == sites
    assert f" of {sites}" in text


@pytest.mark.parametrize("cases", ("recipes", "inference", "methods"))
def test_every_case_has_values_in_eager_mode(bench: Any, cases: str) -> None:
    """Tables of adapters have those of PEFT's names."""
    import torch
    from measuring import compare, inference
    from measuring.contenders import BASELINE
    from measuring.steps import Contender, Step

    for name, case in dict(bench.SETS[cases](32, None)).items():
        if "bitsandbytes" in name:
            pytest.importorskip("bitsandbytes")
        task = case.make(torch.device("cpu"))
        known = {BASELINE: Contender(None)}
        if "mixed" in name:
            known["A[k]"] = Contender(None, convert=inference.tabled)
        values = {n: Step(contender, task).values() for n, contender in known.items()}
        assert all(x.isfinite().all() and x.any() for x in values[BASELINE]), name
        assert values.keys() == compare.compared(task, values).keys()


@pytest.mark.usefixtures("no_profile")
def test_a_contender_on_request_runs_in_every_set(bench: Any, tmp_path: Path) -> None:
    given = ("methods", "Flora, momentum", "--scale", "64", "--contenders", TUNED)
    status, found, text = run(bench, tmp_path, *given)
    assert status == 0, text
    assert list(found["cases"][0]["contenders"]) == ["PEFT + Inductor", TUNED]


def test_an_unknown_contender_is_refused(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(bench, tmp_path, "paper", "--contenders", "fastest")
    message = capsys.readouterr().err
    assert "unknown contenders ['fastest']; valid are" in message and TUNED in message


def test_a_cycle_leaves_the_weights_of_others_alone(bench: ModuleType) -> None:
    """ReLoRA changes its base weights."""
    import torch
    from measuring import methods
    from measuring.steps import Contender, Step

    task = methods.relora(1, torch.device("cpu"))
    before = {name: weight.clone() for name, weight in task.adapted.named_parameters()}
    step = Step(Contender(None), task)
    step()
    changed = {
        name for name, weight in step.model.named_parameters() if weight.ne(before[name]).any()
    }
    assert changed == {name for name in before if "norm" not in name}
    assert all(weight.equal(before[name]) for name, weight in task.adapted.named_parameters())


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


def test_an_adapter_of_lorafusion_calls_its_operator(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package needs a GPU, so a function with its signature stands for it."""
    import torch
    from measuring import compare, libraries, models
    from measuring.contenders import BASELINE
    from measuring.libraries import lorafusion
    from measuring.steps import Contender, Step
    from torch.nn.functional import linear

    assert libraries.contender(lorafusion, None) == "lorafusion is not installed"
    operator = ModuleType("lorafusion.ops.lora_v1")
    operator.fused_linear_lora = lambda x, linear_w, lora_a, lora_b, alpha, linear_bias: (  # type: ignore[attr-defined]
        linear(x, linear_w, linear_bias) + alpha * linear(linear(x, lora_a), lora_b)
    )
    monkeypatch.setitem(sys.modules, operator.__name__, operator)
    for name in ("lorafusion", "lorafusion.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    task = models.task_of(models.PAPER["opt-350m, rank 128, bf16"], torch.device("cpu"))
    task = task.exact(torch.float32)
    convert = partial(libraries.replaced, make=lorafusion.layer)
    known = {BASELINE: Contender(None), "LoRAFusion": Contender(None, convert=convert)}
    values = {name: Step(contender, task).values() for name, contender in known.items()}
    assert len(values["LoRAFusion"]) == len(values[BASELINE]) == 2 + 2 * 6
    assert compare.compared(task, values)["LoRAFusion"] < 1e-5


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


def test_the_papers_models_can_be_shortened(bench: Any) -> None:
    from measuring.models import PAPER

    cut = replace(PAPER[CASE], rows=4, length=16, layers=2)
    for tokens, rows, length in ((8, 1, 8), (16, 1, 16), (40, 2, 16), (1000, 4, 16)):
        short = cut.shortened(tokens)
        assert (short.layers, short.rows, short.length) == (1, rows, length)
        assert f"1 of 24 layers, {rows} x {length} tokens" in short.about
