"""`benchmarks/on_gpu.py` at its smallest, on a CPU, with backends that need no compiler."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._dynamo.backends.common import aot_autograd

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, with contenders that compile in moments."""
    pytest.importorskip("peft")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import on_gpu
    from measuring.contenders import BASELINE, EAGER, FROZEN

    contenders = {
        FROZEN: on_gpu.Contender("aot_eager_decomp_partition", is_adapted=False),
        EAGER: on_gpu.Contender(None),
        # Unchanged, and with the masks of the same decompositions.
        BASELINE: on_gpu.Contender("runlora_eager", {"runlora.margin": 0.99}),
        "runlora": on_gpu.Contender("runlora_eager", {"runlora.strict": True}),
    }
    recipes = {name: recipe for name, (recipe, _) in on_gpu.CASES.items()}
    monkeypatch.setattr(on_gpu, "CASES", {n: (r, contenders) for n, r in recipes.items()})
    yield on_gpu
    for name in list(sys.modules):
        if name.startswith(("on_gpu", "measuring")):
            sys.modules.pop(name)


def run(bench: Any, out: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Its exit status, its JSON and its Markdown."""
    common = ["--device", "cpu", "--scale", "64", "--calibrate", "0", "--rounds", "2"]
    status = bench.main([*arguments, *common, "--out", str(out)])
    found = json.loads((out / "on_gpu.json").read_text(encoding="utf-8"))
    return status, found, (out / "on_gpu.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "case",
    (
        "dropout 0.05",
        *(pytest.param(x, marks=pytest.mark.slow) for x in ("no dropout", "checkpointing")),
    ),
)
def test_contenders_are_compared_and_timed(bench: Any, tmp_path: Path, case: str) -> None:
    status, found, text = run(bench, tmp_path, case)
    assert status == 0, text
    (result,) = found["cases"]
    rows = result["contenders"]
    assert result["rounds"] == 2
    assert list(rows) == ["frozen, Inductor", "PEFT, eager", "PEFT + Inductor", "runlora"]
    for row in rows.values():
        assert row["median_s"] > 0
        assert row["peak_B"] > 0
        assert row["ratio"]["least"] <= row["ratio"]["median"] <= row["ratio"]["most"]
    assert set(rows["PEFT + Inductor"]["ratio"].values()) == {1.0}
    # What has no reference has no error: the frozen layer, and other masks.
    assert ("error" in rows["PEFT, eager"]) is (case != "dropout 0.05")
    assert "error" not in rows["frozen, Inductor"]
    assert 0 <= rows["runlora"]["error"] < 0.05
    assert "Measured on" in text
    assert f"## {case}" in text


@pytest.mark.slow
def test_other_values_are_refused_without_times(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        def call(*args: Any) -> Any:
            return [2 * x if isinstance(x, Tensor) else x for x in gm(*args)]

        return torch._functorch.aot_autograd.make_boxed_func(call)

    recipe, contenders = bench.CASES["no dropout"]
    wrong = bench.Contender(aot_autograd(fw_compiler=doubled))
    monkeypatch.setitem(bench.CASES, "no dropout", (recipe, {**contenders, "wrong": wrong}))
    status, found, text = run(bench, tmp_path, "no dropout")
    assert status == 1
    assert found["cases"][0].keys() == {"case", "refused"}
    assert "wrong: relative error" in text
    assert "| runlora |" not in text


def test_what_the_time_does_not_allow_is_listed(bench: Any, tmp_path: Path) -> None:
    status, found, text = run(bench, tmp_path, "DoRA", "checkpointing", "--seconds", "0")
    assert (status, found["cases"], found["not_run"]) == (0, [], ["DoRA", "checkpointing"])
    assert "Not run, the time was up: DoRA, checkpointing." in text


def test_an_unknown_case_is_refused(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(bench, tmp_path, "no such case")
    assert "unknown cases ['no such case']; valid are" in capsys.readouterr().err
