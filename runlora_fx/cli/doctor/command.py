"""The command `runlora doctor`: all checks, as a table or as JSON.

    problem  compiler  C++  Inductor finds none ... -> install g++ ...

Invariant: the exit status is 1 exactly if there is a problem.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from runlora_fx.cli.console import quietly, results, status
from runlora_fx.cli.doctor import installed
from runlora_fx.cli.doctor.finding import Finding, table, verdict

Check: TypeAlias = Callable[[], Iterable[Finding]]


def run(*, compiles: bool, as_json: bool) -> int:
    """Check everything, and print what was found.

    Args:
        compiles: True to compile a layer with Inductor too.
        as_json: True to print JSON.

    Returns:
        The exit status: 1 if there is a problem, else 0.
    """
    with status("Checking ..."):
        findings = list(_findings(compiles))
    if as_json:
        content = {"verdict": verdict(findings), "findings": [f.as_dict() for f in findings]}
        print(json.dumps(content, indent=1))
    else:
        console = results()
        console.print(table(findings))
        console.print(f"\n{verdict(findings)}")
    return int(any(finding.state == "problem" for finding in findings))


def _findings(compiles: bool) -> Iterator[Finding]:
    yield from _tried("installed", installed.check)
    if not installed.is_torch_usable():
        return  # nothing of ours can be imported
    for area, check in _with_torch(compiles):
        yield from _tried(area, check)


def _with_torch(compiles: bool) -> Iterator[tuple[str, Check]]:
    """The checks that import torch, which may fail."""

    def compiler() -> Iterable[Finding]:
        with quietly():
            from runlora_fx.cli.doctor import inductor
        return inductor.compiler()

    def devices() -> Iterable[Finding]:
        from runlora_fx.cli.doctor import devices

        return devices.check()

    def caches() -> Iterable[Finding]:
        from runlora_fx.cli.doctor import folders, inductor

        return [*folders.profiles_folder(), *inductor.caches()]

    def backends() -> Iterable[Finding]:
        from runlora_fx.cli.doctor import inductor

        return inductor.backends()

    def settings() -> Iterable[Finding]:
        from runlora_fx.cli.doctor import inductor

        return inductor.settings()

    def self_test() -> Iterable[Finding]:
        from runlora_fx.cli.doctor import self_test

        names = ("runlora_eager", "runlora") if compiles else ("runlora_eager",)
        return [finding for name in names for finding in self_test.check(name)]

    yield "compiler", compiler
    yield "devices", devices
    yield "caches", caches
    yield "backends", backends
    yield "settings", settings
    yield "self-test", self_test


def _tried(area: str, check: Check) -> Iterator[Finding]:
    """What a check finds; a problem if it fails itself."""
    try:
        yield from list(check())
    except Exception as error:  # what is broken may raise anything
        text = f"the check failed: {type(error).__name__}: {error}"
        yield Finding(area, "check", "problem", text, "install runlora-fx and torch again")
