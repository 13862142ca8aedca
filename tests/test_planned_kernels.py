"""Fused kernels in plans: only where the device's profile has measured them faster."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_implementations import UPDATE, layer, names
from test_search import FLOPS
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from runlora_fx import Options
from runlora_fx.cost_model import store
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.cost_model.devices.measure import runs_kernels
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import Merge, MergeShape
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile
from runlora_fx.cost_model.store import Record
from runlora_fx.passes.levels.aten import ATEN, DIFFERENTIABLE_ATEN
from runlora_fx.passes.levels.level import Dialect
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.search.frontiers import candidate_products, search
from runlora_fx.passes.tune import pricing

CPU = torch.device("cpu")
TIME = Objective("time")
PROBLEM = layer(5000, UPDATE)
OUT, IN, RANK = 96, 64, 4


def merges() -> list[MergeShape]:
    return [s for s in candidate_products(PROBLEM, TIME) if isinstance(s, MergeShape)]


def measured(fused: float | None, plain: float | None) -> Objective:
    """The default machine, on which the merge was measured: fused, and by ``addmm``."""
    pair = zip(merges()[0].pair, (fused, plain), strict=True)
    times = tuple((shape, seconds) for shape, seconds in pair if seconds is not None)
    return Objective("time", profile=MachineProfile(DEFAULT_PROFILE.known, times))


# --- the search


def test_tuning_may_measure_the_merge_both_ways() -> None:
    fused, plain = merges()
    assert fused in (MergeShape(OUT, IN, RANK), MergeShape(IN, OUT, RANK))
    assert plain == fused._replace(is_fused=False)


def test_a_merge_that_was_measured_faster_runs_fused() -> None:
    found = search(PROBLEM, measured(1e-9, 2e-9)).plan
    assert names(found) == {"merge_kernel": 1, "matmul": 1}
    (merge,) = [o for o in found.operations(PROBLEM) if isinstance(o, Merge)]
    assert merge.shape == merges()[0]
    assert merge.cost.bytes == (2 * OUT * IN + RANK * (OUT + IN)) * PROBLEM.itemsize
    assert merge.cost.flops == 2 * OUT * IN * RANK


@pytest.mark.parametrize(
    "times",
    [(None, None), (1e-9, None), (None, 1.0), (2e-9, 1e-9), (1e-9, 1e-9), (1.0, 2.0)],
    ids=["neither", "fused alone", "addmm alone", "slower", "equal", "both slow"],
)
def test_any_other_merge_runs_as_addmm(times: tuple[float | None, float | None]) -> None:
    assert names(search(PROBLEM, measured(*times)).plan) == {"addmm": 1, "matmul": 1}


def test_flops_choose_no_kernel() -> None:
    objective = replace(measured(1e-9, 1.0), name="flops")
    assert names(search(PROBLEM, objective).plan) == names(search(PROBLEM, FLOPS).plan)


def test_no_kernel_is_measured_on_a_cpu() -> None:
    assert not runs_kernels(CPU, "float32")


@pytest.mark.parametrize(
    "runs",
    [
        False,
        pytest.param(
            True,
            marks=pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed"),
        ),
    ],
)
def test_tuning_times_a_merge_both_ways_where_kernels_run(
    runs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU takes the place of a GPU, and torch's operators that of the kernel."""
    monkeypatch.setenv(store.FOLDER_VARIABLE, str(tmp_path))
    monkeypatch.setattr(pricing, "runs_kernels", lambda device, dtype: runs)
    times = pricing.Pricing(Options(tune="shapes"), Machine(use_stored=True), CPU)
    times.measure([PROBLEM])
    found = times.record("float32").products
    assert [s for s in found if isinstance(s, MergeShape)] == (merges() if runs else [])
    assert set(found) >= {s for s in candidate_products(PROBLEM, TIME) if s not in merges()}


# --- stored times


def test_times_of_merges_are_stored(tmp_path: Path) -> None:
    record = Record(products={shape: 1e-5 for shape in merges()})
    store.write(tmp_path / "profile.json", {"float32": record})
    assert store.read(tmp_path / "profile.json") == {"float32": record}


@pytest.mark.parametrize(
    "sizes", [[0, 64, 4, True], [64, 64, 4], [64, 64, 4.5, True], [1, 2, 3, 4, 5]]
)
def test_times_of_nothing_are_refused(tmp_path: Path, sizes: list[Any]) -> None:
    path = tmp_path / "profile.json"
    store.write(path, {"float32": Record(products={MergeShape(7, 8, 9): 1e-5})})
    text = path.read_text(encoding="utf-8")
    assert "[7, 8, 9, 1]" in text
    path.write_text(text.replace("[7, 8, 9, 1]", str(sizes)), encoding="utf-8")
    with pytest.raises(ValueError, match="must be a file that `calibrate --export` wrote"):
        store.read(path)


# --- the graph


def lora(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x @ w.t() + 2.0 * (x @ a.t() @ b.t())


def rewritten(path: Path, level: Dialect = ATEN) -> list[str]:
    """What an ATen graph calls, planned for a device that has measured the merge."""
    sizes = ((5000, IN), (OUT, IN), (RANK, IN), (OUT, RANK))
    inputs = [torch.randn(size) for size in sizes]
    shapes = (MergeShape(OUT, IN, RANK), MergeShape(IN, OUT, RANK))
    known = dict(DEFAULT_PROFILE.known)
    times = {one: 1e-9 if one.is_fused else 1.0 for shape in shapes for one in shape.pair}
    records = {"float32": Record(known, times)}
    store.write(path / "profile.json", records)
    gm = make_fx(lora, tracing_mode="fake")(*inputs)
    wanted = gm(*inputs)
    options = Options(device=str(path / "profile.json"), strict=True)
    rewrite_graph(gm.graph, level, options)
    gm.recompile()
    torch.testing.assert_close(gm(*inputs), wanted, rtol=1e-4, atol=1e-4)
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_planned_kernel_is_written(tmp_path: Path) -> None:
    targets = rewritten(tmp_path)
    assert targets.count("runlora.fused_merge.default") == 1
    assert "aten.addmm.default" not in targets


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed")
def test_a_planned_kernel_runs_as_addmm_without_triton(tmp_path: Path) -> None:
    targets = rewritten(tmp_path)
    assert targets.count("aten.addmm.default") == 1


def test_autograd_is_never_given_the_kernel(tmp_path: Path) -> None:
    """The kernel has no derivative, so graphs that autograd may still see run ``addmm``."""
    targets = rewritten(tmp_path, DIFFERENTIABLE_ATEN)
    assert targets.count("aten.addmm.default") == 1
