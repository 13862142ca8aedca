"""Reproducers: a file that rebuilds a graph on which the pass failed, and runs the pass on it.

    RuntimeError: out of luck      ->      reproducers/runtimeerror-3f2a9c0b71de.py

The file has the operators, shapes, strides and dtypes of the graph, and the options. It has no
number of the model, and none of its code.

Invariant: writing a file never fails a compilation. Where a graph has what cannot be written as
code, there is no file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import fx

from runlora_fx import __version__
from runlora_fx._torch_debug import debug_folder
from runlora_fx.cost_model import store
from runlora_fx.options import Options
from runlora_fx.passes.graph_code import GraphCode
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.level import Dialect

_log = logging.getLogger("runlora_fx")

#: The folder of the files in the folder of the package's cache.
_FOLDER = "reproducers"

#: How many files are kept; the oldest are deleted.
_MAX_FILES = 32

_TEXT = """\
\"\"\"A graph on which runlora-fx failed:

{error}

Written by runlora-fx {version} with torch {torch} and Python {python}. It has the shapes of the
model and none of its numbers. Run it to see the error:

    python {name}

Plans depend on the machine: without `calibrate` or `runlora.device` a machine of another kind may
plan something else.
\"\"\"

{imports}

from runlora_fx.passes.rebuild import Builder, Fakes, rewrite_again

FAKES = Fakes()
{code}

REPORT = rewrite_again(
    build(),
    INPUTS,
    is_aten={is_aten},
    may_guard={may_guard},
    joins_in_place={joins_in_place},
    parameters={parameters},
    options={options},
)
print("The graph is rewritten without an error here:")
print(REPORT)
"""


@dataclass(frozen=True)
class Run:
    """How a pass was called, besides the graph.

    Attributes:
        level: The level of the graph.
        options: The options of the pass.
        may_guard: True if Dynamo compiles the graph.
        joins_in_place: True if what compiles the graph joins matrices without copies.
        parameters: Positions of the inputs that are parameters.
    """

    level: Dialect
    options: Options
    may_guard: bool
    joins_in_place: bool
    parameters: tuple[int, ...]


class Reproducer:
    """Writes one file for one run of the pass, when something first fails in it."""

    def __init__(self, graph: Callable[[], fx.Graph], run: Run) -> None:
        """Note what to write.

        Args:
            graph: Returns the graph as it came.
            run: How the pass was called.
        """
        self._graph = graph
        self._run = run
        self._said: str | None = None

    def __call__(self, error: Exception) -> str:
        """Write the file, and return what a warning says of it; empty if there is none."""
        if self._said is None:
            try:
                self._said = f", with {self._written(error)}, which reproduces it"
            except Exception as trouble:
                _log.info("runlora wrote no reproducer: %s: %s", type(trouble).__name__, trouble)
                self._said = ""
        return self._said

    def _written(self, error: Exception) -> Path:
        """The path of the file.

        Raises:
            Exception: If it cannot be written.
        """
        folder = debug_folder() or store.folder() / _FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        kind = type(error).__name__
        code = GraphCode(self._graph())
        said = f"{kind}: {error}"
        digest = sha256(f"{said}{code.text}{self._run.options}".encode()).hexdigest()[:12]
        path = folder / f"{kind.lower()}-{digest}.py"
        run = self._run
        text = _TEXT.format(
            error=said.replace("\\", "\\\\").replace('"""', "'''"),
            version=__version__,
            torch=torch.__version__,
            python=sys.version.split()[0],
            name=path.name,
            imports="\n".join(code.imports),
            code=code.text,
            is_aten=run.level is ATEN,
            may_guard=run.may_guard,
            joins_in_place=run.joins_in_place,
            parameters=run.parameters,
            options=asdict(run.options),
        )
        store.write_text(path, text)
        store.drop_oldest(folder, "*.py", _MAX_FILES)
        return path
