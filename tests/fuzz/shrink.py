"""Making a failing program small, and writing it as a script.

    shrunk(case, fails) -> the case with as few lines, outputs and tensors as still fail

Each step drops one thing: an output, a line (whoever read its value reads another of the same
shape), an odd layout, a gradient. A step is kept if the same failure stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.case import PRELUDE, Case, Given, Line, Program
from tests.fuzz.generate import pruned
from tests.fuzz.levels import Level


def shrunk(case: Case, fails: Callable[[Case], bool], effort: int = 150) -> Case:
    """A smaller case that fails in the same way; at most `effort` cases are tried."""
    tried = 0
    while True:
        for smaller in _smaller(case):
            tried += 1
            if tried > effort:
                return case
            if fails(smaller):
                case = smaller
                break
        else:
            return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases with one thing less."""
    for i in range(len(case.outputs)):
        if len(case.outputs) > 1:
            outputs = case.outputs[:i] + case.outputs[i + 1 :]
            yield pruned(replace(case, outputs=outputs))
    values = _values(case)
    for i in reversed(range(len(case.lines))):
        yield from _without_line(case, i, values)
    for i, given in enumerate(case.given):
        for simpler in _simpler(given):
            yield replace(case, given=(*case.given[:i], simpler, *case.given[i + 1 :]))


def _without_line(case: Case, i: int, values: Mapping[str, Tensor]) -> Iterator[Case]:
    """The case without a line: what read its value reads another, or a new input."""
    line = case.lines[i]
    rest = case.lines[:i] + case.lines[i + 1 :]
    if not line.target:
        yield pruned(replace(case, lines=rest))
        return
    made = values.get(line.target)
    known = [g.name for g in case.given] + [x.target for x in case.lines[:i] if x.target]
    alike = [n for n in known if n in values and made is not None and _alike(values[n], made)]
    for other in sorted(alike, key=lambda name: name not in line.reads)[:3]:
        yield _renamed(case, rest, line.target, other)
    if line.target in case.outputs or made is None:
        return
    name = f"x{1 + max([int(g.name[1:]) for g in case.given if g.kind == 'input'], default=-1)}"
    sizes = {size: dim for dim, size in reversed(case.sizes.items())}
    if all(size in sizes for size in made.shape):
        dims = tuple(sizes[size] for size in made.shape)
        new = Given(name, "input", dims, seed=len(case.given) + 7, dtype=str(made.dtype))
        yield _renamed(replace(case, given=(*case.given, new)), rest, line.target, name)


def _renamed(case: Case, lines: tuple[Line, ...], old: str, new: str) -> Case:
    outputs = tuple(dict.fromkeys(new if name == old else name for name in case.outputs))
    lines = tuple(line.renamed(old, new) for line in lines)
    return pruned(replace(case, lines=lines, outputs=outputs))


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def _simpler(given: Given) -> Iterator[Given]:
    if given.kind == "module":
        return
    if given.layout != "plain":
        yield replace(given, layout="plain")
    if given.grad:
        yield replace(given, grad=False)
    if given.kind == "parameter":
        yield replace(given, kind="frozen")


def _values(case: Case) -> dict[str, Tensor]:
    """What every name of a case holds, run eagerly."""
    program = Program(case)
    model, inputs = program.model(), program.inputs()
    handed = [g.name for g in case.given if g.kind == "input"]
    env: dict[str, Any] = dict(program.names) | {"self": model}
    env.update(zip(handed, inputs, strict=True))
    try:
        with torch.no_grad():
            for line in case.lines:
                exec(str(line), env)
    except (RuntimeError, TypeError, IndexError):
        return {}
    for g in case.given:
        env[g.name] = getattr(model, g.name[5:]) if g.name.startswith("self.") else env[g.name]
    return {name: x for name, x in env.items() if isinstance(x, Tensor)}


_RUN = {
    "torch": """
gm = torch.fx.symbolic_trace(model)
rewritten = runlora_fx.rewrite(gm, args, strict=True, objective="flops")
""",
    "dynamo": """
def backend(gm, _):
    return runlora_fx.rewrite(gm, strict=True, objective="flops")

rewritten = torch.compile(model, backend=backend, fullgraph=True, dynamic={dynamic})
""",
    "joint": """
options = {{"runlora.strict": True, "runlora.objective": "flops"}}
rewritten = torch.compile(
    model, backend="runlora_eager", fullgraph=True, dynamic={dynamic}, options=options
)
""",
    "export": """
dims = [{{d: torch.export.Dim.AUTO for d in range(x.dim())}} for x in args] if {dynamic} else None
gm = torch.export.export(model, tuple(args), dynamic_shapes=dims).module()
rewritten = runlora_fx.rewrite(gm, None if {dynamic} else args, strict=True, objective="flops")
""",
}

_COMPARE = """
torch.manual_seed(0)
wanted = copy.deepcopy(model)(*inputs(SIZES))
torch.manual_seed(0)
found = rewritten(*inputs(SIZES))
for y, z in zip(found, wanted):
    print((y - z).abs().max().item() if y.numel() else 0.0, y.stride(), z.stride())
sum(y.double().sum() for y in found if y.requires_grad).backward()
"""


def script(case: Case, level: Level, *, dynamic: bool, text: str) -> str:
    """A case as a script of its own."""
    doc = text.replace("\\", "\\\\").replace('"""', "'''")
    head = f'"""{doc}\n\nlevel {level}, dynamic={dynamic}\n"""\n\nimport copy\n\n'
    body = f"{PRELUDE}\nimport runlora_fx\n\n\n{case.source()}\n\nSIZES = {dict(case.sizes)!r}\n"
    if level in _RUN:
        body += "\nmodel, args = Model(SIZES), inputs(SIZES)\n"
        return head + body + _RUN[level].format(dynamic=dynamic) + _COMPARE
    return head + body + _OF_LEVEL.format(level=level, dynamic=dynamic)


_OF_LEVEL = """
# The level needs more of a harness: run from the root of the repository.
from tests.fuzz.case import Program
from tests.fuzz.compare import compare, values_of
from tests.fuzz.levels import LEVELS, eager_of

wanted = values_of(eager_of("{level}"), Model(SIZES), inputs(SIZES), with_grads=False)
found = values_of(LEVELS["{level}"]({dynamic}, True), Model(SIZES), inputs(SIZES), with_grads=False)
compare(found, wanted)
"""
