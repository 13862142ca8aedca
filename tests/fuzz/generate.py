"""Random programs: statements drawn one by one, each run as it is drawn.

    random_case(seed=3) -> Case: a module with a few weights, and 4 to 12 statements

A statement that fails, or whose numbers grow too large, is dropped; so every case runs eagerly,
forward and backward. The same seed makes the same case.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.fuzz.case import PRELUDE, Case, Given, Line, Program
from tests.fuzz.layers import LAYERS
from tests.fuzz.operators import OPERATORS, Draw

#: Sizes that dimensions have: batch, sequence, features in and out, ranks, another width.
_SIZES = {
    "b": (2, 3, 1),
    "s": (5, 4, 9, 1),
    "i": (8, 6, 1),
    "o": (7, 10, 8, 1),
    "r": (2, 3, 1),
    "q": (3, 4, 2),
    "k": (6, 11),
}

#: Entries of the largest tensor, and the largest number that a statement may make.
_MAX_NUMEL, _MAX_NUMBER = 4000, 300.0


class Builder:
    """Draws one case.

    Attributes:
        rng: Where every choice comes from.
        mixed: Whether dtypes other than double precision are drawn.
    """

    def __init__(self, seed: int) -> None:
        """Choose the sizes, the operators and the first input."""
        self.rng = random.Random(seed)
        choose = self.rng.choice
        # The first of the sizes mostly; rarely no element at all.
        self.sizes = {
            dim: sizes[0] if self.rng.random() < 0.6 else choose(sizes)
            for dim, sizes in _SIZES.items()
        }
        if self.rng.random() < 0.05:
            self.sizes[choose("bsior")] = 0
        self.mixed = self.rng.random() < 0.2
        # Each program uses some operators only, so that all combinations come to be seen.
        kept = [draw for draw in OPERATORS if self.rng.random() < 0.6]
        self._operators: list[Draw] = kept or list(OPERATORS)
        self.given: list[Given] = []
        self.lines: list[Line] = []
        self._counts = {"x": 0, "p": 0, "b": 0, "m": 0, "v": 0}
        self._owner = SimpleNamespace()
        self._env: dict[str, Any] = {"self": self._owner}
        exec(PRELUDE, self._env)
        self.values: dict[str, Tensor] = {}
        self.add_given(choose((("b", "s", "i"), ("s", "i"), ("b", "i"))), "input")

    # -- what operators draw from --------------------------------------------------------------

    def chance(self, p: float) -> bool:
        """True with a probability."""
        return self.rng.random() < p

    def pick(self, fits: Callable[[Tensor], bool] = lambda _: True, *, made: bool = False) -> str:
        """The name of a value that fits, mostly a late one.

        Raises:
            LookupError: If there is none.
        """
        names = [
            name for name, x in self.values.items() if fits(x) and (not made or name[0] == "v")
        ]
        if not names:
            raise LookupError
        if self.chance(0.6):
            names = names[-3:]
        return self.rng.choice(names)

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a value."""
        return tuple(self.values[name].shape)

    def like(self, *shape: int, dtype: torch.dtype = torch.float64, new: float = 0.5) -> str:
        """A value of a shape: one that is there, or a new weight or input."""
        fits = [n for n, x in self.values.items() if tuple(x.shape) == shape and x.dtype == dtype]
        if fits and not self.chance(new):
            return self.rng.choice(fits)
        kinds = ("parameter", "parameter", "parameter", "frozen", "input", "buffer")
        return self.add_given([self.name_of(n) for n in shape], self.rng.choice(kinds), dtype)

    def weight(self, out: int, inner: int, dtype: torch.dtype = torch.float64) -> str:
        """The source of an (out, inner) matrix, maybe a transpose."""
        if self.chance(0.3):
            return self.like(inner, out, dtype=dtype) + self.rng.choice((".t()", ".mT", ".T"))
        return self.like(out, inner, dtype=dtype)

    def size(self) -> int:
        """The size of some features or of a rank."""
        return self.sizes[self.rng.choice("ioorrqk")]

    def number(self) -> str:
        """A number to scale by."""
        return self.rng.choice(("2", "0.5", "-1", "1.0", "0.25", "3.0", "1e-3"))

    def name_of(self, size: int) -> str:
        """The name of a dimension of a size; a new one if there is none."""
        fits = [dim for dim, known in self.sizes.items() if known == size]
        if fits:
            return self.rng.choice(fits)
        name = f"d{size}"
        self.sizes[name] = size
        return name

    # -- what operators add --------------------------------------------------------------------

    def add_given(
        self, dims: Any, kind: str, dtype: torch.dtype = torch.float64, layout: str = ""
    ) -> str:
        """Give the program one more tensor."""
        letter = {"input": "x", "buffer": "b", "module": "m"}.get(kind, "p")
        count = self._counts[letter]
        self._counts[letter] += 1
        if not layout:
            layouts = ["plain"] * 6 + ["turned"] * bool(len(dims) > 1)
            if kind == "input" and dims:
                layouts += ["sliced", "offset"]
                layouts += ["expanded"] if self.sizes[dims[0]] > 1 else []
            layout = self.rng.choice(layouts)
        name = f"{letter}{count}" if kind == "input" else f"self.{letter}{count}"
        grad = kind == "input" and layout != "expanded" and self.chance(0.5)
        seed = len(self.given)
        given = Given(name, kind, tuple(dims), layout, grad, seed, str(dtype))
        self.given.append(given)
        made = eval(given.expression(), {**self._env, "sizes": self.sizes})
        if kind == "input":
            self._env[name] = made
        else:
            setattr(self._owner, name.removeprefix("self."), made)
        if isinstance(made, Tensor):
            self.values[name] = made
        return name

    def module(self, expression: str) -> str:
        """Give the program a module."""
        return self.add_given((), "module", layout=expression)

    def do(self, code: str) -> str:
        """Add ``v = code``; the name of v.

        Raises:
            LookupError: If that fails or makes numbers that are too large.
        """
        made = self._run(f"({code})")
        fits = isinstance(made, Tensor) and made.is_floating_point()
        if not fits or made.numel() > _MAX_NUMEL or made.dim() > 4 or _is_wild(made):
            raise LookupError
        name = f"v{self._counts['v']}"
        self._counts["v"] += 1
        self.lines.append(Line(code, name))
        self.values[name] = self._env[name] = made
        return name

    def effect(self, code: str) -> None:
        """Add a statement that is run for what it changes.

        Raises:
            LookupError: If it fails.
        """
        self._run(code)
        self.lines.append(Line(code))

    def _run(self, code: str) -> Any:
        try:
            torch.manual_seed(0)
            return eval(code, self._env)
        except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise LookupError from error

    # -- the case ------------------------------------------------------------------------------

    def build(self) -> Case:
        """Draw the statements and what is returned."""
        for draw in self.rng.sample(LAYERS, self.rng.choice((0, 1, 1, 1, 2))):
            self._try(draw)
        weights = [draw.weight for draw in self._operators]
        for _ in range(self.rng.randint(2, 9)):
            self._try(self.rng.choices(self._operators, weights)[0])
        made = [name for name in self.values if name[0] == "v"]
        if not made:
            raise LookupError
        read = {name for line in self.lines for name in line.reads}
        ends = [name for name in made if name not in read]
        outputs = self.rng.sample(ends, min(len(ends), self.rng.randint(1, 3)))
        outputs = outputs or [made[-1]]
        if self.chance(0.5):
            outputs.append(self.rng.choice(made))
        if self.chance(0.08):
            outputs.append(self.rng.choice([g.name for g in self.given if g.kind != "module"]))
        return pruned(
            Case(dict(self.sizes), tuple(self.given), tuple(self.lines), tuple(outputs)),
            keep_dead=self.chance(0.05),
        )

    def _try(self, draw: Draw) -> None:
        """Let an operator add its lines; take them back if it fails on the way."""
        begin = len(self.lines)
        try:
            draw.add(self)
        except LookupError:
            if any(not line.target for line in self.lines[begin:]):
                return  # what it changed stays changed
            for line in self.lines[begin:]:
                del self.values[line.target]
            del self.lines[begin:]


def pruned(case: Case, *, keep_dead: bool = False) -> Case:
    """The case without lines and tensors that nothing reads."""
    needed, lines = set(case.outputs), []
    for line in reversed(case.lines):
        if not line.target or line.target in needed or keep_dead:
            needed |= line.reads
            lines.append(line)
    given = tuple(g for g in case.given if g.name in needed)
    used = {dim for g in given for dim in g.dims}
    sizes = {dim: size for dim, size in case.sizes.items() if dim in used}
    return Case(sizes, given, tuple(reversed(lines)), case.outputs)


def random_case(seed: int) -> Case:
    """The case of a seed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for attempt in range(100):
            try:
                case = Builder(seed * 100 + attempt).build()
            except LookupError:
                continue
            if _runs(case):
                return case
    raise RuntimeError(f"no case for seed {seed}")


def _runs(case: Case) -> bool:
    """Whether a case runs eagerly, forward and backward."""
    program = Program(case)
    model, inputs = program.model(), program.inputs()
    try:
        outputs = model(*inputs)
        heads = [y for y in outputs if y.requires_grad]
        for head in heads:
            head.double().sum().backward(retain_graph=True)
    except RuntimeError:
        return False
    return not any(_is_wild(y) for y in outputs)


def _is_wild(x: Tensor) -> bool:
    """Whether a tensor holds numbers that are too large to compare."""
    return bool(x.numel()) and not bool(x.detach().abs().max() < _MAX_NUMBER)
