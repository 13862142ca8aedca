"""Private names of torch: a version that lacks some is told by their names, all at once."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

from runlora_fx import _torch_names

SOURCE = Path(_torch_names.__file__)


class Name(NamedTuple):
    """``from module import name``, and the line that says so."""

    module: str
    name: str
    line: int


def imported(tree: ast.AST) -> Iterator[Name]:
    """Every name that a module imports of torch, those for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _is_torch(node.module or ""):
            yield from (Name(node.module or "", x.name, node.lineno) for x in node.names)


def _is_torch(module: str) -> bool:
    return module.split(".")[0] in ("torch", "functorch")


def missing(names: Iterator[Name]) -> list[str]:
    """What the installed torch lacks, each with the line that imports it."""
    found = []
    for module, name, line in names:
        try:
            is_there = hasattr(importlib.import_module(module), name) or _is_module(module, name)
        except ImportError:
            is_there = False
        if not is_there:
            found.append(f"torch {torch.__version__} lacks {module}.{name} ({SOURCE.name}:{line})")
    return found


def _is_module(module: str, name: str) -> bool:
    return isinstance(importlib.import_module(f"{module}.{name}"), ModuleType)


def test_torch_has_every_name() -> None:
    names = list(imported(ast.parse(SOURCE.read_text(encoding="utf-8"))))
    assert len(names) >= len(_torch_names.__all__)
    assert not missing(iter(names))


def test_what_torch_lacks_is_named() -> None:
    code = """
from torch._dynamo.pgo import _CODE_STATE, of_another_version
from torch._of_another_version import anything
"""
    first, second = missing(imported(ast.parse(code)))
    assert first == (
        f"torch {torch.__version__} lacks torch._dynamo.pgo.of_another_version (_torch_names.py:2)"
    )
    assert "lacks torch._of_another_version.anything" in second


@pytest.mark.parametrize("name", _torch_names.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(_torch_names, name) is not None


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'of_another_version'"):
        _torch_names.of_another_version  # noqa: B018


def test_a_module_that_torch_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_torch_names._LATER, "a_name", "torch._of_another_version")
    with pytest.raises(AttributeError, match=r"torch lacks torch\._of_another_version\.a_name"):
        _torch_names.a_name  # noqa: B018
