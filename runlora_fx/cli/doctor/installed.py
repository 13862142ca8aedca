"""Installed packages: their versions, and whether those are supported.

    torch 2.4.0   problem   needs >=2.11

The supported versions are those that the metadata of this package requires.

Invariant: nothing is imported but the metadata, so a broken package cannot break the check.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from runlora_fx import __version__
from runlora_fx.cli.doctor.finding import Finding, State

#: The newest torch that the tests were run with (docs/contributing.md).
NEWEST_TORCH = "2.14"

#: Packages that nobody has to have, and what they are for.
OPTIONAL = {
    "peft": "adapters, and `runlora explain`, `gain` and `demo`",
    "transformers": "models, and `runlora explain`, `gain` and `demo`",
    "triton": "kernels on GPUs",
    "torchao": "quantised weights",
    "bitsandbytes": "quantised weights",
    "accelerate": "its Trainer",
    "matplotlib": "`runlora crossover --save`",
}

_DISTRIBUTION = "runlora-fx"


def check() -> Iterator[Finding]:
    """The versions of Python, this package, and what it needs or can use."""
    yield Finding("installed", "python", "ok", platform.python_version())
    yield Finding("installed", _DISTRIBUTION, "ok", __version__)
    needed, optional = _requirements()
    for name, specifier in needed.items():
        yield _package(name, specifier)
    for name, use in OPTIONAL.items():
        yield _package(name, optional.get(name, SpecifierSet()), use)


def version_of(name: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def is_torch_usable() -> bool:
    """True if a torch is installed that this package can import."""
    version, specifier = version_of("torch"), _requirements()[0].get("torch", SpecifierSet())
    return version is not None and specifier.contains(Version(version).base_version)


def _requirements() -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    """By package, the versions that are supported: of those that are needed, and of others."""
    needed: dict[str, SpecifierSet] = {}
    optional: dict[str, SpecifierSet] = {}
    try:
        lines = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # run from its source
        lines = ["torch>=2.11"]
    for line in lines:
        requirement = Requirement(line)
        is_optional = "extra" in str(requirement.marker or "")
        (optional if is_optional else needed)[requirement.name] = requirement.specifier
    return needed, optional


def _package(name: str, specifier: SpecifierSet, use: str = "") -> Finding:
    """One package; ``use`` is what an optional one is for."""
    version = version_of(name)
    install = f"pip install '{name}{specifier}'"
    if version is None and use:
        return Finding("installed", name, "ok", f"not installed; only for {use}")
    if version is None:
        return Finding("installed", name, "problem", "not installed", install)
    if not specifier.contains(Version(version).base_version, prereleases=True):
        state: State = "warning" if use else "problem"
        return Finding("installed", name, state, f"{version}; needs {specifier}", install)
    if name == "torch" and Version(version).release[:2] > Version(NEWEST_TORCH).release[:2]:
        text = f"{version}; newer than {NEWEST_TORCH}, the newest that the tests were run with"
        remedy = f"if something fails, try torch {NEWEST_TORCH}"
        return Finding("installed", name, "warning", text, remedy)
    supported = f" (supported: {specifier})" if specifier else ""
    return Finding("installed", name, "ok", f"{version}{supported}")
