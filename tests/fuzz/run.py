"""Running one program at one level: traced, rewritten, compared with what it computes eagerly.

    outcome_of(case, "joint") -> Outcome(changed=True), or one with a failure

Values, gradients, mutated inputs and buffers are compared in double precision, and the strides of
outputs. What fails without the rewriting too is no failure of the rewriting: such a program is
skipped at that level.
"""

from __future__ import annotations

import logging
import re
import signal
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from torch import Tensor

from runlora_fx import history
from tests.fuzz.case import Case, Program
from tests.fuzz.compare import DifferentError, compare, values_of
from tests.fuzz.levels import (
    LEVELS,
    Level,
    Run,
    eager_of,
    has_promised_strides,
    traced,
)

#: CPU seconds that one program may take at one level [s].
TIME_LIMIT = 20.0


@dataclass(frozen=True)
class Failure:
    """What went wrong.

    Attributes:
        kind: ``"exception"``, ``"mismatch"``, ``"strides"``, ``"warning"``, ``"slow"`` or
            ``"dearer"`` (more FLOPs than before).
        cause: The same for failures that likely have one root: where it was raised, or what kind of
            value is wrong.
        text: What to print.
    """

    kind: str
    cause: str
    text: str


@dataclass(frozen=True)
class Outcome:
    """What became of a program at a level.

    Attributes:
        changed: Whether the rewriting changed the graph.
        failure: What went wrong, if something did.
        skipped: Whether it fails without the rewriting too.
    """

    changed: bool = False
    failure: Failure | None = None
    skipped: bool = False


class TooSlowError(BaseException):
    """A program took too long; not an Exception, so that nothing on the way catches it."""


class WarnedError(Exception):
    """The package warned, or refused to rewrite something."""


@dataclass(frozen=True)
class _Expected:
    """What a program computes eagerly, at each of the sizes it is run with."""

    sizes: list[Mapping[str, int]]
    wanted: list[dict[str, Tensor]]
    exact: list[dict[str, Tensor] | None]


def outcome_of(case: Case, level: Level, *, dynamic: bool = False, excuses: bool = True) -> Outcome:
    """Run a case at a level and compare it with eager.

    Args:
        case: The program.
        level: How it is traced.
        dynamic: Whether all sizes are dynamic; then it is run with two sets of sizes.
        excuses: Whether a failing program is run without the rewriting too.
    """
    program = Program(case)
    try:
        expected = _expected(program, level, dynamic)
    except RuntimeError:
        return Outcome(skipped=True)
    changed = False
    try:
        with _no_warnings(), _time_limit(), history.collecting() as reports:
            _check_rewritten(program, level, expected, dynamic)
        changed = any(report.flops_after != report.flops_before for report in reports)
        changed = changed or any(site.changed for report in reports for site in report.sites)
        dearer = [r for r in reports if r.flops_after > r.flops_before]
        if dearer and not dynamic and level != "timed":
            text = f"{dearer[0].flops_before} -> {dearer[0].flops_after} FLOP"
            return Outcome(changed, Failure("dearer", "dearer", text))
        refused = [refusal.reason for report in reports for refusal in report.refusals]
        if refused:
            raise WarnedError(f"refused: {refused[0]}")
    except (Exception, TooSlowError) as error:
        failure = _failure(error)
        if excuses and _fails_alike(program, level, dynamic, expected, failure):
            return Outcome(changed, skipped=True)
        return Outcome(changed, failure)
    return Outcome(changed)


def _expected(program: Program, level: Level, dynamic: bool) -> _Expected:
    case = program.case
    alike = level in ("make_fx", "step")
    if dynamic and (other := case.other_sizes(alike=alike)) != case.sizes:
        try:
            return _expected_at(program, level, [case.sizes, other])
        except RuntimeError:
            pass  # sizes that were equal only by chance
    return _expected_at(program, level, [case.sizes])


def _expected_at(program: Program, level: Level, sizes: list[Mapping[str, int]]) -> _Expected:
    case, run = program.case, eager_of(level)
    wanted = [_values(program, level, each, run) for each in sizes]
    if not case.is_lossy:
        return _Expected(sizes, wanted, [None] * len(sizes))
    if case.is_random:  # other dtypes draw other numbers
        return _Expected(sizes, wanted, list(wanted))
    double = Program(case, double=True)
    return _Expected(sizes, wanted, [_values(double, level, each, run) for each in sizes])


def _values(
    program: Program, level: Level, sizes: Mapping[str, int], run: Run, model: Any = None
) -> dict[str, Tensor]:
    model = program.model(sizes) if model is None else model
    with_grads = level not in ("make_fx", "step")
    return values_of(run, model, program.inputs(sizes), with_grads=with_grads)


def _check(
    program: Program, level: Level, expected: _Expected, run: Run, *, strides: bool = True
) -> None:
    """Require of a run what eager computes, at all sizes."""
    model = program.model()
    state = {name: x.clone() for name, x in model.state_dict().items()}
    pairs = zip(expected.sizes, expected.wanted, expected.exact, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for sizes, wanted, exact in pairs:
            model.load_state_dict(state)
            found = _values(program, level, sizes, run, model)
            compare(found, wanted, exact, strides=strides)


def _check_rewritten(program: Program, level: Level, expected: _Expected, dynamic: bool) -> None:
    """Require what eager computes; the strides only if torch itself knows them."""
    try:
        _check(program, level, expected, LEVELS[level](dynamic, True))
    except DifferentError as error:
        if error.kind != "strides" or level not in ("make_fx", "step"):
            raise
        model, inputs = program.model(), program.inputs(expected.sizes[0])
        graph = traced(level, model, inputs, dynamic=dynamic)
        if has_promised_strides(graph, model, inputs):
            raise
        _check(program, level, expected, LEVELS[level](dynamic, True), strides=False)


def _fails_alike(
    program: Program, level: Level, dynamic: bool, expected: _Expected, failure: Failure
) -> bool:
    """Whether the program fails without the rewriting too."""
    if failure.kind in ("slow", "warning"):
        return False
    try:
        _check(program, level, expected, LEVELS[level](dynamic, False))
    except Exception as error:
        # An exception of its own: the program cannot be judged at this level.
        return _failure(error).kind in (failure.kind, "exception")
    return False


def _failure(error: BaseException) -> Failure:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, DifferentError):
        return Failure(error.kind, f"{error.kind} {re.sub(r'[0-9]+', '', error.name)}", text)
    if isinstance(error, TooSlowError):
        return Failure("slow", "slow", text)
    if isinstance(error, WarnedError):
        return Failure("warning", "warning " + _without_names(str(error)), text)
    inner: BaseException = error
    while (below := getattr(inner, "inner_exception", None) or inner.__cause__) is not None:
        inner = below
    frames = traceback.extract_tb(inner.__traceback__)
    ours = [f"{f.filename.rpartition('runlora_fx/')[2]}:{f.name}" for f in frames]
    ours = [name for f, name in zip(frames, ours, strict=True) if "runlora_fx/" in f.filename]
    where = " < ".join(reversed(ours[-2:])) or "outside"
    message = str(inner).splitlines()[0] if str(inner) else ""
    message = _without_names(message.partition(": ")[2] or message)
    cause = f"{type(inner).__name__} in {where}: {message}"
    trace = "".join(traceback.format_exception(inner)[-6:])
    return Failure("exception", cause, f"{type(inner).__name__}: {inner}\n{trace}")


def _without_names(text: str) -> str:
    """A message without the numbers that differ from case to case."""
    return re.sub(r"_?[0-9]+", "#", text)[:60]


@contextmanager
def _no_warnings() -> Iterator[None]:
    """A context in which every warning of the package is an error."""
    log = logging.getLogger("runlora_fx")

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise WarnedError(record.getMessage())

    handler = Handler(logging.WARNING)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextmanager
def _time_limit() -> Iterator[None]:
    """A context that is left by an error after some CPU seconds."""

    def stop(_: int, __: FrameType | None) -> None:
        raise TooSlowError(f"more than {TIME_LIMIT} s")

    before: Callable[..., Any] | Any = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TIME_LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
