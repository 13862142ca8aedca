"""Compatibility: what torch offers for debugging: logs, traces, the debug folder, what is compiled.

``TORCH_LOGS``, ``TORCH_TRACE`` and ``TORCH_COMPILE_DEBUG`` -> functions with names of ours.

Invariant: nothing here changes what is compiled.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import cast

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from runlora_fx._torch_compat import size_hint
from runlora_fx._torch_names import (
    ConstantSource,
    CppCompileError,
    FakeTensorMode,
    InstructionTranslator,
    InvalidCxxCompiler,
    PythonPrinter,
    _get_qualified_name,
    enable_python_dispatcher,
    get_aot_graph_name,
    get_debug_dir,
    inductor_config,
    torch_logging,
)

#: The name of our logger, and of the package: ``TORCH_LOGS`` takes names of modules.
LOGGER = "runlora_fx"

#: What ``TORCH_LOGS`` names besides loggers: by name, a description, and whether it is shown only
#: if it is named.
_ARTIFACTS = {
    "runlora_plan": ("runlora: the report on each graph", False),
    "runlora_graph": ("runlora: each graph before and after the rewrite", True),
}

_folders, _sizes = itertools.count(), itertools.count()


def _register() -> None:
    """Register our names, so that torch's logging settings take them."""
    torch_logging.register_log("runlora", LOGGER)
    for name, (description, off_by_default) in _ARTIFACTS.items():
        torch_logging.register_artifact(name, description, off_by_default=off_by_default)


_register()

#: The loggers of the artifacts. With TORCH_LOGS="+runlora_fx" the first is enabled too.
PLAN_LOG, GRAPH_LOG = (torch_logging.getArtifactLogger(LOGGER, name) for name in _ARTIFACTS)


def is_graph_wanted() -> bool:
    """True if someone asked to see graphs before and after a pass."""
    return (
        GRAPH_LOG.isEnabledFor(logging.DEBUG) or is_traced() or bool(inductor_config.trace.enabled)
    )


def is_traced() -> bool:
    """True if structured traces are written to a folder (``TORCH_TRACE``)."""
    handlers = torch_logging.trace_log.handlers
    writing = [h for h in handlers if isinstance(h, torch_logging.LazyTraceHandler)]
    return any(h.root_dir is not None for h in writing)


def trace(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Add an artifact to the structured trace, if one is collected.

    Args:
        name: The name of the artifact; ``tlparse`` shows it as a file.
        encoding: ``"string"`` or ``"json"``.
        payload: Makes its content.
    """
    torch_logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": encoding},
        payload_fn=payload,
        expect_trace_id=False,
    )


def debug_folder() -> Path | None:
    """A new folder for one graph beside those of Inductor; None unless Inductor is asked for one.

    ``TORCH_COMPILE_DEBUG=1`` and the option ``trace.enabled`` of Inductor ask for it.

    Raises:
        OSError: If it cannot be made.
    """
    return new_debug_folder() if inductor_config.trace.enabled else None


def new_debug_folder() -> Path:
    """A new folder for one graph in torch's debug folder.

    Raises:
        OSError: If it cannot be made.
    """
    of_run = Path(inductor_config.trace.debug_dir or get_debug_dir())
    while True:
        folder = of_run / "runlora" / f"{get_aot_graph_name()}.{next(_folders)}"
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # another process has it
            continue


def source_of(graph: fx.Graph, meta: str = "") -> str:
    """A graph as Python code, with shapes, strides and dtypes.

    Args:
        graph: The graph.
        meta: The key of metadata that is shown as a comment, if there is any.
    """
    code = graph.python_code(
        "self",
        verbose=True,
        include_stride=True,
        include_device=True,
        additional_meta=[meta] if meta else None,
    )
    return code.src.lstrip("\n")


def inductor_options() -> Iterable[str]:
    """The names of Inductor's options."""
    return inductor_config.get_config_copy().keys()


def compiled_modules() -> list[nn.Module]:
    """The modules among the arguments and variables of the function that Dynamo traces now."""
    try:
        values = InstructionTranslator.current_tx().output.root_tx.f_locals.values()
    except AttributeError:  # nothing is being traced
        return []
    return [value for value in values if isinstance(value, nn.Module)]


def lacks_compiler(error: BaseException) -> bool:
    """True if an error says that Inductor has no C++ compiler that works."""
    return isinstance(getattr(error, "inner_exception", error), InvalidCxxCompiler)


def compiler_says(error: BaseException) -> str | None:
    """What the C++ compiler said last when it failed; None if an error is another one."""
    inner = getattr(error, "inner_exception", error)
    if not isinstance(inner, CppCompileError):
        return None
    return str(inner).strip().rpartition("\n")[2].strip()


# -- graphs with symbolic sizes that are built again --------------------------------------------


def symbolic_mode() -> FakeTensorMode:
    """A fake mode that takes symbolic sizes."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def keeping_symbols() -> AbstractContextManager[None]:
    """A context in which operators on fake tensors fix no symbolic size, as while tracing."""
    return cast(AbstractContextManager[None], enable_python_dispatcher())


def symbolic_size(mode: FakeTensorMode, hint: int) -> torch.SymInt:
    """A new symbolic size of a mode, and its value when it was traced."""
    env = mode.shape_env
    assert env is not None
    source = ConstantSource(f"size_{next(_sizes)}")
    symbol = env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
    return cast(torch.SymInt, env.create_symintnode(symbol, hint=hint, source=source))


def is_backed(size: torch.SymInt) -> bool:
    """True if a size was known when the graph was traced."""
    return bool(size.node.has_hint())


def code_of_size(size: torch.SymInt, mode: FakeTensorMode | None) -> tuple[str, dict[str, int]]:
    """A size as Python code, and the values that its symbols had when the graph was traced."""
    expression = size.node.expr
    hints = {str(symbol): size_hint(symbol, mode, 2) for symbol in expression.free_symbols}
    return PythonPrinter().doprint(expression), hints


def function_name(function: Callable[..., object]) -> str:
    """The name by which a function can be found, with its module."""
    return _get_qualified_name(function)
