"""The blocks of code in the documentation run as they stand, and links in the checkout lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import BLOCKS, PAGES, ROOT, RUN, Block
from recipes import RECIPES

#: Blocks that nobody runs. Each has its reason; raise this number only for a good one.
MOST_NOT_RUN = 12

RUNNER = """
import sys
namespace = {"__name__": "__main__"}
for path, name, line in BLOCKS:
    code = "\\n" * (line - 1) + open(path, encoding="utf-8").read()
    exec(compile(code, name, "exec"), namespace)
"""

SHIMS = {"python": '"{0}" "$@"', "runlora": '"{0}" -m runlora_fx "$@"'}

#: The pages whose blocks run in every test run.
QUICK = ("README.md", "docs/reading-a-report.md")

PAGES_WITH = {
    language: sorted(
        {block.page for block in BLOCKS if block.is_run and block.language == language}
    )
    for language in RUN
}


def of_page(page: str, language: str) -> list[Block]:
    return [b for b in BLOCKS if b.page == page and b.is_run and b.language == language]


def run(command: list[str], folder: Path, **variables: str) -> str:
    """Run in a folder with this checkout; the command must succeed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **variables}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


# --- what is run, and what is not


def test_every_block_says_who_runs_it() -> None:
    wrong = [
        f"{b.page}:{b.line}: {b.mark}: {b.what}"
        for b in BLOCKS
        if b.language in RUN and b.mark not in ("", "run", "ci", "not run")
    ]
    assert wrong == []
    assert {b.what for b in BLOCKS if b.mark == "run"} == RECIPES.keys()
    # .ci/run takes its commands from README.md by these names.
    assert [b.what for b in BLOCKS if b.mark == "ci"] == ["demo", "test"]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for block in BLOCKS:
        if block.mark == "ci":
            assert block.page == "README.md"
            assert f"readme_command {block.what}" in script
            assert block.code.count("\n") == 1  # one line of shell


def test_few_blocks_are_not_run_and_each_has_its_reason() -> None:
    not_run = [block for block in BLOCKS if block.mark == "not run"]
    assert all(len(block.what.split()) >= 3 for block in not_run)
    assert len(not_run) <= MOST_NOT_RUN


def test_no_block_hides_behind_another_language() -> None:
    """Shell and Python are marked as what they are."""
    others = {block.language for block in BLOCKS} - set(RUN)
    assert others <= {"yaml", "text", "json"}


# --- the blocks


@pytest.mark.parametrize(
    "page",
    [
        # Half a minute each; the workflow of the documentation runs all of them.
        pytest.param(page, marks=() if page in QUICK else pytest.mark.slow)
        for page in PAGES_WITH["python"]
    ],
)
def test_python_blocks_run(page: str, tmp_path: Path) -> None:
    blocks = of_page(page, "python")
    prelude = (str(ROOT / "tests" / "prelude.py"), "prelude", 1)
    listed = [prelude]
    for i, block in enumerate(blocks):
        path = tmp_path / f"block_{i}.py"
        path.write_text(block.code, encoding="utf-8")
        listed.append((str(path), block.page, block.line))
    script = tmp_path / "run.py"
    script.write_text(f"BLOCKS = {listed!r}\n{RUNNER}print('all blocks ran')\n", encoding="utf-8")
    # A graph from a cache has no report to print.
    printed = run(
        [sys.executable, str(script)],
        tmp_path,
        TORCHINDUCTOR_FX_GRAPH_CACHE="0",
        TORCHINDUCTOR_AUTOGRAD_CACHE="0",
    )
    assert printed.endswith("all blocks ran\n")


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=() if p in QUICK else pytest.mark.slow) for p in PAGES_WITH["bash"]],
)
def test_shell_blocks_run(page: str, tmp_path: Path) -> None:
    shims = tmp_path / "bin"
    shims.mkdir()
    for name, command in SHIMS.items():
        shim = shims / name
        shim.write_text(f"#!/bin/sh\nexec {command.format(sys.executable)}\n", encoding="utf-8")
        shim.chmod(0o755)
    path = f"{shims}{os.pathsep}{os.environ['PATH']}"
    for block in of_page(page, "bash"):
        printed = run(["bash", "-euo", "pipefail", "-c", block.code], ROOT, PATH=path)
        assert printed.strip(), f"{block.page}:{block.line} prints nothing"


# --- links


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives to headings."""
    without_code = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted(ROOT.glob("[A-Z]*.md")), *sorted((ROOT / ".github").glob("**/*.md"))],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_links_lead_to_files_and_headings_of_the_checkout(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        text_there = file.read_text(encoding="utf-8") if anchor and file.is_file() else ""
        if not file.exists() or (anchor and anchor not in anchors_of(text_there)):
            broken.append(target)
    assert broken == []


def test_readme_promises_no_release() -> None:
    """Until one is on an index, installation is from a checkout; docs/release.md, step 6."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    is_released = re.search(r"^## \[\d", changelog, re.MULTILINE) is not None
    for page in PAGES:
        promised = "pip install runlora-fx" in page.read_text(encoding="utf-8")
        assert is_released or not promised, page.name
