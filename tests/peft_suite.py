"""PEFT's own tests of torch.compile and of hot-swapping, with our backend as the default one.

    python -m tests.peft_suite PATH_TO_PEFT_CHECKOUT [--backend runlora] [-- PYTEST_ARGUMENTS]

Runs ``tests/test_torch_compile.py`` and the hot-swap tests of the checkout in a pytest of their
own. ``torch.compile`` without a backend, or with ``"inductor"``, takes ``--backend``; a backend
that a test names otherwise is left alone. The PEFT that is tested is the one in the checkout.
Nothing is fetched: the hubs are set to be offline, and tests that need a model of the hub fail
while they are set up. They are counted apart.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runlora_fx

#: Where the tests are: a file of the checkout, and which of its tests.
SUITES = (("tests/test_torch_compile.py", ""), ("tests/test_initialization.py", "HotSwapping"))

#: What ours adds: errors are raised, and the small layers of these tests are worth a rewrite.
OPTIONS = {"runlora.strict": True, "runlora.objective": "flops"}

#: What libraries of the hub raise, and say, when they cannot reach it.
_HUB = ("OfflineModeIsEnabled", "LocalEntryNotFoundError", "couldn't connect", "offline mode")


def with_default(backend: str, compile_: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` with another default backend."""

    @functools.wraps(compile_)
    def compile_with_default(model: Any = None, **settings: Any) -> Any:
        if settings.get("backend", "inductor") == "inductor":
            settings["backend"] = backend
            # A mode and options exclude each other.
            if settings.get("mode") is None:
                settings["options"] = {**OPTIONS, **(settings.get("options") or {})}
        return compile_(model, **settings)

    return compile_with_default


class Figures:
    """A plugin of pytest: replaces the default backend, and counts what comes of the tests."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.counts: Counter[str] = Counter()
        self.graphs = self.rewritten = 0
        self._seen: object = None

    def pytest_configure(self) -> None:
        """Replace ``torch.compile`` before any test file is imported."""
        torch.compile = with_default(self.backend, torch.compile)  # type: ignore[assignment]

    def pytest_runtest_setup(self) -> None:
        """Forget the graphs of the last test."""
        torch._dynamo.reset()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test once: where it fails, is skipped, or ends."""
        last = runlora_fx.last_report()
        if last is not None and last is not self._seen:
            self._seen = last
            self.graphs += 1
            self.rewritten += any(site.changed for site in last.sites)
        if report.failed:
            # The message stands at the end of the traceback.
            text = str(report.longrepr)[-8000:]
            needs_hub = any(sign in text for sign in _HUB)
            self.counts["need a model of the hub" if needs_hub else "failed"] += 1
        elif report.skipped:
            self.counts["skipped"] += 1
        elif report.when == "call":
            self.counts["passed"] += 1


def make_room(checkout: Path) -> None:
    """Let ``tests`` and ``peft`` be those of the checkout; ours are a package ``tests`` too."""
    own = Path(__file__).resolve().parents[1]
    for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "peft")]:
        del sys.modules[name]
    elsewhere = [path for path in sys.path if Path(path).resolve() != own]
    sys.path[:] = [str(checkout / "src"), str(checkout), *elsewhere]
    os.chdir(checkout)


def missing(checkout: Path) -> str:
    """What a checkout of PEFT lacks to be tested, or nothing."""
    if not (checkout / "src" / "peft" / "__init__.py").is_file():
        return f"{checkout} is no checkout of PEFT: it has no src/peft/__init__.py"
    for file, _ in SUITES:
        if not (checkout / file).is_file():
            return (
                f"{checkout} has no {file}: take a checkout of PEFT 0.18 or later, with its tests"
            )
    return ""


def main() -> int:
    """Run the tests; 1 if one fails for another reason than the hub."""
    parser = argparse.ArgumentParser(prog="python -m tests.peft_suite", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--backend", default="runlora")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, behind --")
    asked = parser.parse_args()
    checkout = asked.checkout.resolve()
    if lack := missing(checkout):
        parser.error(lack)
    # PEFT's tests of torch.compile are skipped unless this is set.
    os.environ["PEFT_DEBUG_WITH_TORCH_COMPILE"] = "1"
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    make_room(checkout)
    total: Counter[str] = Counter()
    figures = Figures(asked.backend)
    for file, only in SUITES:
        chosen = ["-k", only] if only else []
        options = [
            "--no-header",
            "-q",
            "-o",
            "addopts=",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            str(checkout),
        ]
        status = pytest.main([file, *chosen, *options, *asked.pytest], plugins=[figures])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            print(f"{file} did not run: see above for what is missing")
            total["failed"] += 1
    total += figures.counts
    print(f"PEFT of {checkout}, backend {asked.backend!r}: {dict(total)}")
    print(f"{figures.graphs} tests compiled graphs; {figures.rewritten} of them a rewritten one")
    return int(total["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
