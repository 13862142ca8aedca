"""What documentation shows: examples run, code compiles, named things exist, commands work."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import runlora_fx
from runlora_fx.__main__ import main

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

DEMO_OPTIONS = ("--model", "--rank", "--batch", "--seq", "--dtype", "--dropout", "--steps")

BLOCKS = [
    (path.name, block)
    for path in DOCUMENTS
    for block in re.findall(
        r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
]

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def run_python(*arguments: str) -> str:
    """What a Python process prints; it must succeed.

    A graph from Inductor's cache is not planned, and there would be no report to look at; generated
    kernels do come from their cache.
    """
    no_graph_caches = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "0", "TORCHINDUCTOR_AUTOGRAD_CACHE": "0"}
    done = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **no_graph_caches},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def flops_changes(printed: str) -> list[float]:
    """The changes of FLOPs that reports begin with [percent]."""
    return [float(change) for change in re.findall(r"FLOP \(([-+][\d.]+)%\)", printed)]


# --- examples


def test_rewrite_graph_shows_the_merged_weight_in_both_graphs() -> None:
    printed = run_python("examples/rewrite_graph.py")
    # It says "512 tokens are more than 256 * 256 / (256 + 256), so the weight is merged".
    assert "Y = X (W' + 2 A' B')" in printed
    forward, joint = flops_changes(printed)
    assert forward < 0
    assert joint < 0
    assert printed.index("of the torch graph:") < printed.index("of the joint graph:")
    # The code of both: the adapter is added to the base weight by one product.
    assert "torch.addmm(base_weight, up_weight, down_weight, alpha = 2)" in printed
    assert "def forward(self, primals, tangents)" in printed


def test_train_peft_learns_and_reports_every_adapted_layer() -> None:
    printed = run_python("examples/train_peft.py")
    losses = losses_of(printed)
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    (change,) = flops_changes(printed)
    assert change < 0
    # "all-linear" is q, k, v, o, gate, up and down in the one layer.
    layers = re.findall(r"^Order \w+: (\d+) layers? in rows? ", printed, re.MULTILINE)
    assert sum(map(int, layers)) == 7


def losses_of(printed: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"^loss ([\d.]+)$", printed, re.MULTILINE)]


def test_custom_module_trains_as_in_eager_mode() -> None:
    printed = run_python("examples/custom_module.py")  # compares the losses itself
    (change,) = flops_changes(printed)
    assert change < 0
    assert "M = W + 2 B A   (recomputed in the backward)" in printed


def test_dora_learns_in_one_graph() -> None:
    printed = run_python("examples/dora.py", "runlora_eager")
    losses = losses_of(printed)
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    (change,) = flops_changes(printed)
    assert change < 0
    assert "Y = Z diag(g)" in printed


def test_qlora_learns_on_four_bits() -> None:
    pytest.importorskip("bitsandbytes")
    printed = run_python("examples/qlora.py", "runlora_eager")
    losses = losses_of(printed)
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    (change,) = flops_changes(printed)
    assert change < 0
    # Each of the two layers is a site with its sizes.
    assert set(re.findall(r"i=\d+, o=\d+|o=\d+, r=8, i=\d+", printed)) >= {"i=128, o=256"}


@pytest.mark.slow
def test_relora_restarts_without_compiling_again() -> None:
    printed = run_python("examples/relora.py", "runlora_eager")
    losses = [float(x) for x in re.findall(r"^round \d: loss ([\d.]+)$", printed, re.MULTILINE)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)
    assert "graphs compiled: 1\n" in printed


@pytest.mark.slow
def test_several_adapters_compile_once_each() -> None:
    printed = run_python("examples/several_adapters.py")
    shown = re.findall(r"^(\w+): sum (\S+), graphs (\d)$", printed, re.MULTILINE)
    assert [(name, graphs) for name, _, graphs in shown] == [
        ("default", "1"),
        ("second", "2"),
        ("default", "2"),
    ]
    assert shown[0][1] == shown[2][1] != shown[1][1]
    assert "three files of adapters, graphs compiled: 1\n" in printed


@pytest.mark.slow
def test_read_a_report_names_the_cause() -> None:
    printed = run_python("examples/read_a_report.py")
    first, second = re.findall(r"^base_model\.model\.(\d): .*: (.*)$", printed, re.MULTILINE)
    assert (first, second) == (("0", "changed"), ("2", "left alone"))
    assert "cause: dropout; remedy: set lora_dropout=0" in printed
    assert "4*N*i*r + 6*N*o*r -> 2*N*i*o" in printed
    assert "JSON: schema, verdict, " in printed


def test_optimizer_chain_avoids_the_projector() -> None:
    printed = run_python("examples/optimizer_chain.py")
    before, after = (
        int(re.search(rf"^{name}: +([\d,]+) FLOP", printed, re.MULTILINE)[1].replace(",", ""))
        for name in ("as written", "compiled")
    )
    # The projector alone takes 2 m m r FLOP.
    assert before > 2 * 512 * 512 * 8 > 4 * after


def test_plan_for_a_device_needs_no_device() -> None:
    printed = run_python("examples/plan_for_a_device.py")
    for device in ("h100", "rtx4090"):
        assert re.search(
            rf"^{device}: [1-7] of 7 adapted layers rewritten: ", printed, re.MULTILINE
        )


def test_the_notebook_runs() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", as_version=4)
    assert not [c for c in notebook.cells if c.get("outputs")], "clear the outputs before a commit"
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = "".join(o.get("text", "") for cell in code for o in cell.outputs)
    assert "Y = X (W' + 2 A' B')" in printed
    # 32 tokens are few, 512 are many.
    counts = dict(re.findall(r"^(\d+) [\d,]+ -> ([\d,]+)$", printed, re.MULTILINE))
    before = dict(re.findall(r"^(\d+) ([\d,]+) -> ", printed, re.MULTILINE))
    assert counts["32"] == before["32"]
    assert counts["512"] != before["512"]
    assert len(losses_of(printed)) == 3
    assert printed.count("adapted layers rewritten") == 5


def test_every_example_is_run() -> None:
    """Each one is named in a test of this file."""
    source = Path(__file__).read_text(encoding="utf-8")
    named = set(re.findall(r'run_python\("examples/(\w+\.py)"', source))
    assert {path.name for path in EXAMPLES} == named
    assert [path.name for path in (ROOT / "examples").glob("*.ipynb")] == ["tour.ipynb"]


# --- documents


@pytest.mark.parametrize(("document", "block"), BLOCKS)
def test_python_blocks_compile(document: str, block: str) -> None:
    compile(block, document, "exec")


@every_document
def test_named_options_functions_and_files_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    options = set(re.findall(r"\brunlora\.([a-z_]+)", text))
    # A page on mistakes shows a misspelt one.
    assert options - {"memroy"} <= {field.name for field in fields(runlora_fx.Options)}
    names = set(re.findall(r"\brunlora_fx\.(\w+)", text))
    unknown = [name for name in names if not hasattr(runlora_fx, name)]
    assert [name for name in unknown if find_spec(f"runlora_fx.{name}") is None] == []
    paths = set(re.findall(r"`((?:passes|cost_model|docs|examples|tests)/[\w./]*)`", text))
    here = [ROOT, Path(runlora_fx.__file__).parent]
    assert [p for p in paths if not any((base / p).exists() for base in here)] == []


def test_the_table_of_options_is_complete() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", text, re.MULTILINE))
    defaults = runlora_fx.Options()
    real = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
    assert {name: value.replace('"', "'") for name, value in table.items()} == {
        name: repr(value) for name, value in real.items()
    }


def test_the_table_of_backends_is_complete() -> None:
    text = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(runlora\w*)` \|", text, re.MULTILINE))
    assert named == {name for name in torch._dynamo.list_backends() if name.startswith("runlora")}


# --- the command line


def test_help_lists_the_commands() -> None:
    assert re.search(r"^\W+demo\s+\S", run_python("-m", "runlora_fx", "--help"), re.MULTILINE)


def test_help_of_the_demo_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--help"]) == 0
    listed = re.findall(r"^\W+(--\w+)", capsys.readouterr().out, re.MULTILINE)
    assert set(DEMO_OPTIONS) <= set(listed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["train"], "No such command 'train'"),
        (["demo", "--ranks", "8"], "No such option: --ranks"),
        (["demo", "--rank", "eight"], "Invalid value for '--rank'"),
        (["demo", "--rank", "0"], "rank must be at least 1, got 0"),
        (["demo", "--batch", "-1"], "batch must be at least 1, got -1"),
        (["demo", "--seq", "0"], "seq must be at least 1, got 0"),
        (["demo", "--dropout", "1.5"], "dropout must be in [0, 1), got 1.5"),
        (["demo", "--dtype", "int8"], "'int8' is not one of 'float32', 'bfloat16'"),
        (["demo", "--steps", "2"], "steps must be more than 2, got 2"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_bad_arguments_are_refused_with_a_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
