"""Files for those who join or cite the project: they parse, and name what exists."""

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import runlora_fx

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")

ROOT = Path(__file__).parent.parent
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FORMS = [path for path in TEMPLATES if path.name != "config.yml"]


def parsed(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_issue_forms_are_complete(path: Path) -> None:
    form = parsed(path)
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    for field in form["body"]:
        assert field["type"] in ("textarea", "input", "dropdown")
        assert field["attributes"]["label"]
        if field["type"] == "dropdown":
            assert all(isinstance(option, str) for option in field["attributes"]["options"])
    assert [field for field in form["body"] if field.get("validations", {}).get("required")]


def test_a_bug_report_has_what_is_needed_to_reproduce_it() -> None:
    fields = {field["id"]: field for field in parsed(TEMPLATES[0])["body"]}
    for name in ("reproducer", "doctor"):
        assert fields[name]["validations"]["required"]
    assert "runlora doctor" in fields["doctor"]["attributes"]["label"]
    assert set(parsed(ROOT / ".github" / "ISSUE_TEMPLATE" / "config.yml")) == {
        "blank_issues_enabled"
    }


def test_the_workflow_runs_what_the_local_checks_run() -> None:
    workflow = parsed(ROOT / ".github" / "workflows" / "ci.yml")
    jobs = workflow["jobs"]
    assert jobs.keys() == {"lint", "test", "libraries", "docs", "wheel"}
    matrix = jobs["test"]["strategy"]["matrix"]
    assert matrix == {"python": ["3.10", "3.13"], "torch": ["2.11.0", "2.13.0"]}
    commands = [s["run"] for job in jobs.values() for s in job["steps"] if "run" in s]
    local = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("ruff check .", "ruff format --check ."):
        assert command in commands
        assert command in local
    assert any(command.startswith(".ci/check_wheel") for command in commands)
    # Extras that are installed exist.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lists = [found for text in commands for found in re.findall(r"\.\[([\w,]+)\]", text)]
    named = {extra for listed in lists for extra in listed.split(",")}
    assert named <= project["optional-dependencies"].keys()
    tests = {path for text in commands for path in re.findall(r"tests/[\w*]+\.py", text)}
    assert [path for path in tests if not list(ROOT.glob(path))] == []


def test_the_nightly_workflow_runs_the_rows_and_commands_that_exist() -> None:
    jobs = parsed(ROOT / ".github" / "workflows" / "nightly.yml")["jobs"]
    rows = {(row["row"], row["python"]) for row in jobs["matrix"]["strategy"]["matrix"]["include"]}
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    (table,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROWS"
    )
    assert rows == {(name, python) for name, (python, *_) in table.items()}
    for command in jobs["sweeps"]["strategy"]["matrix"]["command"]:
        module = re.fullmatch(r"python -m (pytest|tests\.\w+)( .*)?", command)[1]
        assert importlib.util.find_spec(module) is not None


def test_the_oldest_row_has_the_oldest_that_is_asked_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {*project["dependencies"], *project["optional-dependencies"]["demo"]}
    source = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    oldest = re.search(r'"oldest": \((.*)\)', source)[1]
    assert f'"{project["requires-python"].partition(",")[0].removeprefix(">=")}"' in oldest
    for name in ("torch", "transformers", "peft"):
        (wanted,) = (r for r in asked if r.startswith(f"{name}>="))
        assert wanted.replace(">=", "==") in oldest


def test_the_citation_is_of_this_version() -> None:
    citation = parsed(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == runlora_fx.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert citation["title"] == project["name"]
    assert citation["license"] == project["license"]
    assert citation["abstract"].rstrip(".") == project["description"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_every_extra_is_pinned() -> None:
    """What the checks install has one version; `kernels` is for machines with a GPU."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = set(re.findall(r"^([\w-]+)==", pins, re.MULTILINE))
    extras = project["optional-dependencies"]
    required = {r for name, listed in extras.items() if name != "kernels" for r in listed}
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in required}
    assert names - {"runlora-fx"} <= pinned


def test_the_source_distribution_has_what_the_tests_need() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]
    included = build["build"]["targets"]["sdist"]["include"]
    for pattern in included:
        assert list(ROOT.glob(pattern.removeprefix("/"))), pattern
    for name in ("benchmarks", "docs", "examples", "tests", ".ci", "constraints.txt"):
        assert f"/{name}" in included
