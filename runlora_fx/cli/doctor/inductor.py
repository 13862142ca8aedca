"""Inductor: the compiler that it would use, its caches, and settings that do not go with ours.

Before -> after: no C++ compiler -> a problem that says how to install one.

Invariant: nothing is compiled and no setting is changed.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from runlora_fx._torch_names import cache_dir, cpp_builder, functorch_config, inductor_config
from runlora_fx.cli.doctor.finding import Finding
from runlora_fx.cli.doctor.folders import folder_finding

#: Environment variables that turn compilation off.
_OFF = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")

#: The settings of Inductor that may hold passes of other packages.
_PASSES = (
    *("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass"),
    *("post_grad_custom_pre_pass", "post_grad_custom_post_pass"),
)


def compiler() -> Iterator[Finding]:
    """The C++ compiler."""
    try:
        found = cpp_builder.get_cpp_compiler()
        lines = subprocess.run(
            [found, "--version"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except Exception as error:  # torch raises several kinds
        yield Finding(
            "compiler",
            "C++",
            "problem",
            f"Inductor finds none ({type(error).__name__})",
            "install g++ or clang (Debian: apt-get install g++), or name one in CXX; "
            'backend="runlora_eager" needs none',
        )
        return
    version = lines.strip().partition("\n")[0]
    yield Finding("compiler", "C++", "ok", f"{found}: {version}" if version else found)


def backends() -> Iterator[Finding]:
    """Our backends, which torch finds by their entry points."""
    known = torch.compiler.list_backends()
    for name in ("runlora", "runlora_eager"):
        if name in known:
            yield Finding("backends", name, "ok", "torch finds it by name")
        else:
            remedy = "install the package again: pip install --force-reinstall --no-deps runlora-fx"
            yield Finding("backends", name, "problem", "torch does not find it", remedy)


def caches() -> Iterator[Finding]:
    """Inductor's caches."""
    yield folder_finding("Inductor", Path(cache_dir()), "TORCHINDUCTOR_CACHE_DIR")
    if not inductor_config.fx_graph_cache:
        yield Finding(
            *("caches", "FX graph cache", "warning", "off: every process plans and compiles anew"),
            "unset TORCHINDUCTOR_FX_GRAPH_CACHE, or set torch._inductor.config.fx_graph_cache",
        )
    if torch.compiler.config.force_disable_caches:
        yield Finding(
            *("caches", "all of torch's", "warning", "off: every process compiles anew"),
            "unset TORCHINDUCTOR_FORCE_DISABLE_CACHES",
        )


def settings(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Settings that keep the backend from working, or that it shares Inductor with."""
    found = [*_off(environment), *_random(), *_passes()]
    yield from found or [Finding("settings", "conflicts", "ok", "none known")]


def _off(environment: Mapping[str, str]) -> Iterator[Finding]:
    for name in _OFF:
        if environment.get(name, "0") not in ("", "0"):
            text = f"{name}={environment[name]}: torch.compile does nothing"
            yield Finding("settings", name, "problem", text, f"unset {name}")
    if environment.get("RUNLORA_SUBSTITUTES") == "0":
        yield Finding(
            *("settings", "RUNLORA_SUBSTITUTES", "warning"),
            "0: PEFT's DoRA and adapters on experts are traced in several graphs",
            "unset RUNLORA_SUBSTITUTES",
        )


def _random() -> Iterator[Finding]:
    budget = float(functorch_config.activation_memory_budget)
    name = "activation_memory_budget"
    if budget == 0:
        yield Finding(
            *("settings", name, "problem"),
            "0: the backward draws other dropout masks than the forward",
            f"set torch._functorch.config.{name} to 0.01 or more",
        )
    elif budget < 1 and inductor_config.fallback_random:
        yield Finding(
            *("settings", name, "warning"),
            f"{budget:g} together with fallback_random: masks of dropout are saved, so less "
            "memory is gained than the budget asks for",
            f"set torch._functorch.config.{name} to 1, or fallback_random to False",
        )


def _passes() -> Iterator[Finding]:
    for name in _PASSES:
        found = getattr(inductor_config, name, None)
        if found:
            yield Finding(
                *("settings", name, "warning", f"another package set {found!r:.80}"),
                "if results or plans are odd, try without it",
            )
