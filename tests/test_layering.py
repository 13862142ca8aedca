"""The structure of the package, read off its source: layers, private names of torch, the surface.

Imports go downwards only, so that the algebra, the search and the prices can be understood, tested
and reused without torch, and so that a new release of torch touches few files.
"""

import ast
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

import runlora_fx

PACKAGE = Path(runlora_fx.__file__).parent
ROOT = PACKAGE.parent

# From the ground up; a module imports from its own layer or from those above it in this list.
LAYERS: tuple[tuple[str, ...], ...] = (
    # What a plan is and what it costs; no torch up to here.
    (
        *("cost_model", "cost_model.cost", "cost_model.ops", "cost_model.profile"),
        *("cost_model.objective", "cost_model.store", "cost_model.published"),
    ),
    ("passes", "passes.algebra", "passes.algebra.*"),
    ("passes.search", "passes.search.*"),
    ("options",),
    ("keywords",),
    # The machine.
    ("_requirements",),
    ("_torch_names",),
    ("_torch_compat", "_torch_debug", "_torch_caches", "_torch_group"),
    # Fused kernels for GPUs. Whoever uses them imports them where they are called.
    ("kernels", "kernels.*"),
    ("cost_model.devices", "cost_model.devices.*"),
    ("runtime", "runtime.*"),
    # Graph to algebra, and algebra to graph.
    ("passes.levels", "passes.levels.*"),
    ("passes.read", "passes.read.*"),
    ("passes.context",),
    ("passes.emit", "passes.emit.nodes", "passes.emit.nodes.*"),
    ("passes.emit.steps", "passes.emit.steps.*"),
    ("passes.emit.proof", "passes.emit.proof.*"),
    ("passes.emit.copies", "passes.emit.copies.*"),
    ("passes.emit.graph", "passes.emit.graph.*"),
    ("passes.emit.apply",),
    ("passes.graph_code",),
    ("passes.reproducer",),
    ("passes.stack", "passes.stack.*"),
    ("passes.recompute", "passes.recompute.*"),
    ("passes.upcast",),
    ("passes.tune", "passes.tune.*"),
    # What was done.
    ("report", "report.*"),
    ("history", "inactive", "logs"),
    ("stored_reports",),
    ("plug_in",),
    # The pass, and the ways to it.
    ("passes.planning", "passes.pipeline"),
    ("passes.rebuild",),
    ("joint_pass",),
    ("late_pass",),
    ("estimator",),
    ("integrations", "integrations.*"),
    ("aot",),
    ("backend",),
    ("without_data",),
    ("trace",),
    ("",),  # the package itself
    # The command line. A command imports what it needs when it runs.
    ("cli", "cli.*"),
    ("__main__",),
)

WITHOUT_TORCH = (
    *("cost_model.cost", "cost_model.ops", "cost_model.profile", "cost_model.objective"),
    *("cost_model.store", "cost_model.published", "report.describe.notation"),
    *(
        f"passes.{room}.{path.stem}"
        for room in ("algebra", "search")
        for path in sorted((PACKAGE / "passes" / room).glob("[!_]*.py"))
    ),
)

# The module that imports private parts of torch, and the one private attribute that any may
# use: `torch._ops` has the types of operators, which are public objects.
PRIVATE_TORCH = {"_torch_names"}
PRIVATE_ATTRIBUTE = "torch._ops"


def _files() -> dict[str, Path]:
    """Module name within the package -> its file; "" is the package itself."""
    files = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


FILES = _files()
MODULES = sorted(FILES)
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module or "package")


@cache
def _nodes(module: str) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))))


def _imported(module: str) -> Iterator[str]:
    """Everything a module imports, wherever in its code, as `module` or `module.name`."""
    for node in _nodes(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _dependencies(module: str) -> set[str]:
    """The modules of the package that a module imports."""
    found = set()
    for name in _imported(module):
        # The version is set before the package imports anything: whoever reads it waits for nobody.
        if name.split(".")[0] == "runlora_fx" and name != "runlora_fx.__version__":
            inner = name.removeprefix("runlora_fx").removeprefix(".")
            found.add(inner if inner in FILES else inner.rpartition(".")[0])
    return found


def _layer(module: str) -> int:
    matching = [i for i, layer in enumerate(LAYERS) if any(fnmatch(module, p) for p in layer)]
    assert len(matching) == 1, f"give {module} one place in LAYERS, not {len(matching)}"
    return matching[0]


def _reachable(module: str) -> set[str]:
    found, todo = set(), [module]
    while todo:
        for other in _dependencies(todo.pop()) - found:
            found.add(other)
            todo.append(other)
    return found


# --- layers


@every_module
def test_imports_go_downwards(module: str) -> None:
    above = {other for other in _dependencies(module) if _layer(other) > _layer(module)}
    assert not above


def test_every_layer_exists() -> None:
    """A pattern that no file matches is left over from a file that is gone."""
    patterns = [pattern for layer in LAYERS for pattern in layer]
    assert [p for p in patterns if not any(fnmatch(m, p) for m in MODULES)] == []


def test_no_import_cycles() -> None:
    graph = {module: _dependencies(module) for module in MODULES}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names it
    assert sorted(order) == MODULES


def test_the_cost_model_imports_nothing_of_the_passes() -> None:
    for module in MODULES:
        if module.startswith("cost_model"):
            assert not any(other.startswith("passes") for other in _reachable(module)), module


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_planning_names_no_torch(module: str) -> None:
    for name in {module} | _reachable(module):
        assert not [i for i in _imported(name) if i.split(".")[0] in ("torch", "functorch")], name


def test_planning_runs_without_torch() -> None:
    """The package imports torch when it is imported itself, so an empty one takes its place."""
    code = f"""
import sys, types
sys.modules["torch"] = None
package = sys.modules["runlora_fx"] = types.ModuleType("runlora_fx")
package.__path__ = [{str(PACKAGE)!r}]
import {", ".join(f"runlora_fx.{module}" for module in WITHOUT_TORCH)}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- what is not ours


def _is_private_torch(name: str) -> bool:
    parts = name.split(".")
    return parts[0] == "functorch" or (
        parts[0] == "torch" and any(part.startswith("_") for part in parts[1:])
    )


def test_private_parts_of_torch_are_imported_in_one_module() -> None:
    found = {module for module in MODULES if any(map(_is_private_torch, _imported(module)))}
    assert found == PRIVATE_TORCH


@every_module
def test_private_attributes_of_torch_are_not_used_elsewhere(module: str) -> None:
    if module in PRIVATE_TORCH:
        return
    used = {ast.unparse(node) for node in _nodes(module) if isinstance(node, ast.Attribute)}
    private = {name for name in used if re.match(r"torch(\.\w+)*\._(?!_)\w+$", name)}
    assert private <= {PRIVATE_ATTRIBUTE}


@every_module
def test_nothing_is_unpickled(module: str) -> None:
    banned = {"pickle", "dill", "marshal", "shelve", "cloudpickle"}
    assert not [name for name in _imported(module) if name.split(".")[0] in banned]


# --- the surface


@pytest.mark.parametrize("name", runlora_fx.__all__)
def test_public_names_are_documented(name: str) -> None:
    doc = inspect.getdoc(getattr(runlora_fx, name))
    # A dataclass without a docstring gets its signature for one.
    assert doc
    assert not doc.startswith(f"{name}(")


def test_version_is_that_of_the_changelog() -> None:
    """Either the topmost section is a release, or it is unreleased and says what it leads to."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    pattern = r"^## \[(?:Unreleased\]\s+Towards )?(\d+\.\d+\.\d+)"
    newest = re.search(pattern, changelog, re.MULTILINE)
    assert newest is not None
    assert newest[1] == runlora_fx.__version__ == importlib.metadata.version("runlora-fx")


def test_backends_are_found_by_name() -> None:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends")
    ours = {e.name: e.load() for e in found if e.value.startswith("runlora_fx")}
    assert {name: fn.__name__ for name, fn in ours.items()} == {n: n for n in ours}
    assert ours.keys() == {"runlora", "runlora_eager"}
    assert ours.keys() <= set(torch._dynamo.list_backends())


def test_importing_the_package_is_light() -> None:
    """Neither a model library nor Inductor's compiler is loaded before someone needs it."""
    heavy = ("peft", "transformers", "torch._inductor.compile_fx", "runlora_fx.cli.demo")
    code = f"import runlora_fx, sys; print([m for m in {heavy} if m in sys.modules])"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
