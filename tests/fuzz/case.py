"""A random program as data, and as the source of a script that runs it.

    Case(given=(x0, self.p0), lines=(v0 = x0 @ self.p0.t(),), outputs=(v0,))
    -> class Model(nn.Module): ...; def inputs(sizes): ...

Whatever runs a case runs this source, so a printed case fails as the case did.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_NAME = re.compile(r"self\.[a-z]+\d+|\b[xv]\d+\b")

PRELUDE = '''\
import torch
from torch import nn
from torch.nn import functional as F


def random(shape, seed, layout="plain", dtype=torch.float64):
    """A tensor of random numbers that lies in memory as `layout` says."""
    def draw(*shape):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape, generator=generator, dtype=torch.float64).div(2).to(dtype)
    if layout == "turned":
        return draw(*reversed(shape)).permute(*reversed(range(len(shape))))
    if layout == "expanded":
        return draw(1, *shape[1:]).expand(shape)
    if layout == "sliced":
        return draw(*shape[:-1], 2 * shape[-1])[..., ::2]
    if layout == "offset":
        return draw(*shape[:-1], shape[-1] + 1)[..., 1:]
    return draw(*shape)
'''


@dataclass(frozen=True)
class Given:
    """A tensor or module that a program is given.

    Attributes:
        name: As the program reads it: ``x0`` for inputs, ``self.p0`` for what the module holds.
        kind: ``"input"``, ``"parameter"``, ``"frozen"`` (a parameter without gradient),
            ``"buffer"``, or ``"module"``.
        dims: The names of its sizes.
        layout: How it lies in memory; of a module the expression that makes it.
        grad: Whether an input requires a gradient.
        seed: Of its numbers.
        dtype: Of its numbers.
    """

    name: str
    kind: str
    dims: tuple[str, ...] = ()
    layout: str = "plain"
    grad: bool = False
    seed: int = 0
    dtype: str = "torch.float64"

    def expression(self) -> str:
        """The source that makes it."""
        if self.kind == "module":
            return self.layout
        shape = "".join(f"sizes[{dim!r}], " for dim in self.dims)
        rest = f"{self.seed}" + ("" if self.layout == "plain" else f", {self.layout!r}")
        rest += "" if self.dtype == "torch.float64" else f", dtype={self.dtype}"
        made = f"random(({shape}), {rest})"
        if self.kind in ("parameter", "frozen"):
            return f"nn.Parameter({made}, requires_grad={self.kind == 'parameter'})"
        return f"{made}.requires_grad_()" if self.grad else made


@dataclass(frozen=True)
class Line:
    """One statement: ``target = code``, or an effect where there is no target."""

    code: str
    target: str = ""

    @property
    def reads(self) -> frozenset[str]:
        """The names it reads."""
        return frozenset(_NAME.findall(self.code))

    def renamed(self, old: str, new: str) -> Line:
        """The same with another operand."""
        code = _NAME.sub(lambda name: new if name[0] == old else name[0], self.code)
        return Line(code, self.target)

    def __str__(self) -> str:
        return f"{self.target} = {self.code}" if self.target else self.code


@dataclass(frozen=True)
class Case:
    """A program over given tensors.

    Attributes:
        sizes: The size of every named dimension.
        given: What it is given.
        lines: What it does.
        outputs: The names that it returns.
    """

    sizes: Mapping[str, int]
    given: tuple[Given, ...]
    lines: tuple[Line, ...]
    outputs: tuple[str, ...]

    def other_sizes(self, *, alike: bool = False) -> dict[str, int]:
        """Sizes for a second call: others where only inputs have them, and they are not 0 or 1.

        Args:
            alike: Whether sizes that are equal now stay equal: ``make_fx`` takes them for one
                symbol, and checks nothing when the graph is run.
        """
        held = {dim for g in self.given if g.kind not in ("input", "module") for dim in g.dims}
        if any(g.kind == "module" for g in self.given):
            held |= {"i", "o", "r", "q", "k"}
        spared = {dim for g in self.given if g.layout == "expanded" for dim in g.dims[:1]}
        kept = {dim for dim, size in self.sizes.items() if dim in held | spared or size < 2}
        if alike:
            kept |= {d for d, size in self.sizes.items() if size in {self.sizes[k] for k in kept}}
        first = {size: k for k, size in reversed([*enumerate(self.sizes.values())])}
        return {
            dim: size if dim in kept else size + 3 + 2 * (first[size] if alike else k)
            for k, (dim, size) in enumerate(self.sizes.items())
        }

    @property
    def is_lossy(self) -> bool:
        """Whether something is computed in less than double precision."""
        return bool(_NARROW.search(self.source()))

    @property
    def is_random(self) -> bool:
        """Whether it draws random numbers."""
        return bool(_RANDOM.search(self.source()))

    def source(self) -> str:
        """The classes and functions of the program: ``Model(sizes)`` and ``inputs(sizes)``."""
        held = [g for g in self.given if g.kind != "input"]
        handed = [g for g in self.given if g.kind == "input"]
        lines = ["class Model(nn.Module):"]
        lines += ["    def __init__(self, sizes):", "        super().__init__()"]
        if any(g.kind == "module" for g in held):
            lines.append("        torch.manual_seed(0)")
        for g in held:
            name, made = g.name.removeprefix("self."), g.expression()
            if g.kind == "buffer":
                lines.append(f"        self.register_buffer({name!r}, {made})")
            else:
                lines.append(f"        self.{name} = {made}")
        lines += ["", f"    def forward({', '.join(['self', *(g.name for g in handed)])}):"]
        lines += [f"        {line}" for line in self.lines]
        lines += [f"        return {', '.join(self.outputs)}" + "," * (len(self.outputs) == 1)]
        lines += ["", "", "def inputs(sizes):", "    return ["]
        lines += [f"        {g.expression()}," for g in handed] + ["    ]"]
        return "\n".join(lines) + "\n"


#: What makes numbers narrower than double precision.
_NARROW = re.compile(r"torch\.(bfloat16|float16|float32)|\.(float|half|bfloat16)\(\)")

#: What draws random numbers, or may.
_RANDOM = re.compile(r"ropout\(|rand_like|bernoulli")


def in_double(source: str) -> str:
    """A program with every dtype replaced by double precision."""
    return _NARROW.sub(lambda m: "torch.float64" if m[1] else ".double()", source)


@dataclass(frozen=True)
class Program:
    """A case that can be run."""

    case: Case
    double: bool = False
    _made: dict[str, Any] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        source = in_double(self.case.source()) if self.double else self.case.source()
        exec(compile(PRELUDE + source, "<case>", "exec"), self._made)

    @property
    def names(self) -> Mapping[str, Any]:
        """What the program's source defines and imports."""
        return self._made

    def model(self, sizes: Mapping[str, int] | None = None) -> nn.Module:
        """A new module with the same numbers each time."""
        model = self._made["Model"](self.case.sizes if sizes is None else sizes)
        assert isinstance(model, nn.Module)
        return model

    def inputs(self, sizes: Mapping[str, int] | None = None) -> list[Any]:
        """New inputs with the same numbers each time."""
        made: list[Any] = self._made["inputs"](self.case.sizes if sizes is None else sizes)
        return made
