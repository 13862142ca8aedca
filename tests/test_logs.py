"""What torch's logs, traces and debug folder show, and how emitted nodes are named."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor_config
from checks import RUNLORA_EAGER
from processes import python
from torch import Tensor, nn

import runlora_fx
from runlora_fx import _torch_debug, logs

# Training through matrix products only: Inductor has no kernel to compile.
SCRIPT = """
import sys, torch
torch.manual_seed(0)
w, a, b = torch.randn(24, 16), torch.randn(2, 16), torch.randn(24, 2)
a.requires_grad_(), b.requires_grad_()
run = torch.compile(lambda x: x @ w.t() + (x @ a.t()) @ b.t(), backend=sys.argv[1], fullgraph=True)
run(torch.randn(96, 16)).sum().backward()
"""

FILES = ("graph_after.py", "graph_before.py", "report.json", "report.txt")


class Adapted(nn.Module):
    """A layer for whose tokens merging the adapter pays."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(16, 24, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(16, 2, bias=False)
        self.lora_B = nn.Linear(2, 24, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x) + self.lora_B(self.lora_A(x))
        return result


@pytest.fixture
def layer() -> Adapted:
    torch._dynamo.reset()
    torch.manual_seed(0)
    return Adapted()


@pytest.fixture
def x(layer: Adapted) -> Tensor:
    return torch.randn(96, 16)


def _run(layer: nn.Module, x: Tensor) -> Any:
    return torch.compile(layer, backend=RUNLORA_EAGER, fullgraph=True)(x)


# --- TORCH_LOGS


def test_the_name_of_the_package_shows_the_verdict() -> None:
    done = python("-c", SCRIPT, RUNLORA_EAGER, TORCH_LOGS="runlora_fx")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "runlora_fx/" in line]
    assert re.search(r"^I.*\[0/0\] runlora: 3 of 3 adapted layers rewritten.*\(joint graph\)", line)


def test_a_plus_shows_the_report_and_an_artifact_the_graphs() -> None:
    done = python("-c", SCRIPT, RUNLORA_EAGER, TORCH_LOGS="+runlora_fx,runlora_graph")
    assert done.returncode == 0, done.stderr
    of_plan = [line for line in done.stderr.splitlines() if "[__runlora_plan]" in line]
    assert any("Matrix products of the joint graph: " in line for line in of_plan)
    of_graph = [line for line in done.stderr.splitlines() if "[__runlora_graph]" in line]
    begins = [i for i, line in enumerate(of_graph) if line.endswith("the rewrite:")]
    assert [of_graph[i].split("] ")[-1] for i in begins] == [
        "before the rewrite:",
        "after the rewrite:",
    ]
    before, after = of_graph[: begins[1]], of_graph[begins[1] :]
    assert not any("runlora: " in line for line in before)
    assert any("# runlora: merged weight: primals_" in line for line in after)
    assert any('runlora_merged_weight: "f32[24, 16][16, 1]cpu"' in line for line in after)


def test_torch_refuses_names_that_are_no_module() -> None:
    """It reads the variable before it loads backends, so `runlora` alone is not known."""
    done = python("-c", "import torch", TORCH_LOGS="+runlora")
    assert done.returncode != 0
    assert "Invalid log settings: +runlora" in done.stderr


def test_set_logs_takes_the_names() -> None:
    settings = "{'runlora': 20, 'runlora_graph': True}"
    code = f"import torch, runlora_fx; torch._logging.set_logs(modules={settings})\n{SCRIPT}"
    done = python("-c", code, RUNLORA_EAGER)
    assert done.returncode == 0, done.stderr
    assert "runlora: 3 of 3 adapted layers rewritten" in done.stderr
    assert "[__runlora_graph] after the rewrite:" in done.stderr
    assert "[__runlora_plan]" not in done.stderr


def test_nothing_is_shown_unasked(layer: Adapted, x: Tensor) -> None:
    assert logs.before(runlora_fx.joint_graph(layer, (x,)).graph) == ""
    assert not _torch_debug.is_graph_wanted()


# --- TORCH_TRACE


def _artifacts(trace: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The artifacts of a trace, with what they hold: lines that begin with a tab."""
    entries: list[tuple[dict[str, Any], list[str]]] = []
    for line in trace.read_text().splitlines():
        if line.startswith("\t"):
            entries[-1][1].append(line[1:])
        else:
            entries.append((json.loads(line[line.index("] {") + 2 :]), []))
    return ((entry["artifact"], "\n".join(held)) for entry, held in entries if "artifact" in entry)


def test_the_trace_has_the_report_and_both_graphs(tmp_path: Path) -> None:
    done = python("-c", SCRIPT, RUNLORA_EAGER, TORCH_TRACE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    (trace,) = tmp_path.iterdir()
    found = {entry["name"]: (entry["encoding"], held) for entry, held in _artifacts(trace)}
    ours = {name: held for name, held in found.items() if name.startswith("runlora_")}
    assert sorted(ours) == [f"runlora_{name.replace('.', '_')}" for name in FILES]
    encoding, report = ours["runlora_report_json"]
    assert encoding == "json"
    assert json.loads(report)["verdict"].startswith("3 of 3 adapted layers rewritten")
    assert "Matrix products of the joint graph" in ours["runlora_report_txt"][1]
    assert "runlora_merged_weight" not in ours["runlora_graph_before_py"][1]
    assert "runlora_merged_weight" in ours["runlora_graph_after_py"][1]


# --- TORCH_COMPILE_DEBUG


def test_the_debug_folder_has_files_beside_those_of_inductor(tmp_path: Path) -> None:
    done = python(
        *("-c", SCRIPT, "runlora"),
        TORCH_COMPILE_DEBUG="1",
        TORCH_COMPILE_DEBUG_DIR=str(tmp_path),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("torch_compile_debug/run_*/runlora/*")
    assert f"runlora debug files: {folder}" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == list(FILES)
    assert "runlora_merged_weight" in (folder / "graph_after.py").read_text()
    # Inductor's own files say which kernel computes which of our nodes.
    (mapping,) = folder.parents[1].glob("torchinductor/*forward*/*node_mappings.json")
    assert "runlora_merged_weight" in mapping.read_text()


def test_files_that_cannot_be_written_fail_nothing(
    layer: Adapted, x: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "runlora").write_text("in the way")
    settings = {"trace.enabled": True, "trace.debug_dir": str(tmp_path)}
    with inductor_config.patch(settings), caplog.at_level(logging.INFO, "runlora_fx"):
        torch.testing.assert_close(_run(layer, x), layer(x))
    assert "runlora could not show what it did: " in caplog.text


# --- names of nodes


def test_emitted_nodes_are_named_by_their_step(layer: Adapted, x: Tensor) -> None:
    nodes = list(runlora_fx.joint_graph(layer, (x,)).graph.nodes)
    written = [node for node in nodes if "runlora" in node.meta]
    assert [node for node in nodes if node.name.startswith("runlora_")] == written
    kinds = {node.name: node.meta["runlora"].split(":")[0].replace(" ", "_") for node in written}
    for name, kind in kinds.items():
        assert re.fullmatch(rf"runlora_({kind}|view)(_\d+)?", name)
    (merged,) = [node for node in nodes if node.name == "runlora_merged_weight"]
    assert merged.target is torch.ops.aten.addmm.default
    assert re.fullmatch(
        r"merged weight: primals_\d \+ primals_\d primals_\d", merged.meta["runlora"]
    )


def test_a_sum_with_an_activation_is_no_merged_weight(x: Tensor) -> None:
    """`GELU(X) + X A B` has the form of a merged weight; the graph says that it is none."""
    a, b = (torch.randn(size, requires_grad=True) for size in ((16, 2), (2, 16)))

    def residual(x: Tensor) -> Tensor:
        return nn.functional.gelu(x @ a @ b) + x @ a @ b

    gm = runlora_fx.joint_graph(residual, (x,), objective="flops")
    assert not any(node.name.startswith("runlora_merged_weight") for node in gm.graph.nodes)
