"""Compatibility: what torch's caches of compiled graphs offer, and what is compiled for them.

``save_config_portable``, ``cache_dir``, ``env.guards`` -> functions with names of ours.

Invariant: nothing here changes what is compiled or cached.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sympy
from torch import fx

from runlora_fx._torch_names import (
    FakeTensorMode,
    InstructionTranslator,
    cache_dir,
    functorch_config,
    inductor_config,
)


class Compiling(NamedTuple):
    """What Dynamo compiles in this thread.

    Attributes:
        graph: The graph that the backend was given.
        inputs: Its example inputs.
        notes: Attributes of the object that stands for this compilation, to be added to.
    """

    graph: fx.GraphModule
    inputs: list[Any]
    notes: dict[str, Any]


def compiling() -> Compiling | None:
    """What Dynamo compiles in this thread; None if it compiles nothing, or has no graph yet."""
    try:
        output = InstructionTranslator.current_tx().output
        graph = output.graph.owning_module
    except AttributeError:
        return None
    if not isinstance(graph, fx.GraphModule):
        return None
    return Compiling(graph, output.example_inputs(), vars(output))


def compiler_settings() -> str:
    """A digest of the settings of Inductor that affect its code, in this context.

    Inductor's own caches use the same settings, and functions and passes besides.
    """
    settings = inductor_config.save_config_portable()
    plain = json.dumps(settings, sort_keys=True, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(plain.encode()).hexdigest()[:24]


def keeps_compiled_graphs() -> bool:
    """True if torch keeps compiled graphs in its caches for other processes."""
    is_off = getattr(inductor_config, "force_disable_caches", False)
    return bool(
        functorch_config.enable_autograd_cache and inductor_config.fx_graph_cache and not is_off
    )


def runs_joint_passes() -> bool:
    """True if Inductor runs its joint passes, and ours among them, in this context."""
    return bool(inductor_config.use_joint_graph_passes)


def cache_folder() -> Path:
    """The folder of Inductor's caches."""
    return Path(cache_dir())


def guards_on(
    symbols: Collection[sympy.Symbol], mode: FakeTensorMode | None
) -> Iterator[tuple[sympy.Expr, str]]:
    """The conditions under which compiled code is valid: ``(s0 - 77, ">=")`` for ``s0 >= 77``.

    Args:
        symbols: Symbolic sizes; conditions on others are left out.
        mode: The fake mode that has the guards.
    """
    env = None if mode is None else mode.shape_env
    for guard in () if env is None else env.guards:
        condition = guard.expr
        is_comparison = isinstance(condition, sympy.core.relational.Relational)
        if is_comparison and condition.free_symbols <= set(symbols):
            yield sympy.expand(condition.lhs - condition.rhs), condition.rel_op
