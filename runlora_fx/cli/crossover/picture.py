"""The picture in the terminal: a field of letters, and the tables beside it.

       8  A A A B B
       4  A A A A B
          16  64  256      each letter is a plan, each row a rank, each column a number of tokens

Invariant: nothing is decided here. Without colours the letters say all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from runlora_fx.cli.crossover.borders import Border
from runlora_fx.cli.crossover.contenders import Contender, winners
from runlora_fx.cli.crossover.fields import Field
from runlora_fx.cli.crossover.timed import Timed
from runlora_fx.passes.algebra.problem import Problem

#: The colours of the plans, in the terminal and in drawings: Okabe and Ito's, which differ for
#: everyone.
COLOURS = ("#bbbbbb", "#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")

#: The width of a column, and how many columns apart the numbers of tokens stand.
_CELL, _EVERY = 2, 4


def colour(letter: str) -> str:
    """The colour of a plan."""
    return COLOURS[(ord(letter) - ord("A")) % len(COLOURS)]


def arranged(pictures: Sequence[Text], console: Console) -> RenderableType:
    """Pictures side by side if the terminal is wide enough; below each other elsewhere."""
    widths = [max(map(len, text.plain.splitlines())) for text in pictures]
    if not console.is_terminal or sum(widths) + 4 * len(widths) > console.width:
        return Group(*pictures)
    grid = Table.grid(padding=(0, 4))
    grid.add_row(*pictures)
    return grid


def picture(field: Field, known: Sequence[Contender], rank: int) -> Text:
    """A field, the highest rank on top, and what a report says of the layer of one rank."""
    text = Text(f"{field.basis.title}\n", style="bold")
    text.append(f"{field.basis.source}\n", style="not bold")
    rows = list(zip(field.ranks, winners(field, known), strict=True))
    for row_rank, letters in reversed(rows):
        text.append(f"{row_rank:>6} ", style="not bold")
        for letter in letters:
            text.append(letter.ljust(_CELL), style=f"not bold black on {colour(letter)}")
        text.append("\n")
    text.append("rank   ", style="not bold")
    for size in field.tokens[::_EVERY]:
        text.append(_short(size).ljust(_CELL * _EVERY), style="not bold")
    text.append("tokens\n", style="not bold")
    said = f"A report says at rank {rank}: merging the adapter pays {field.break_even(rank)}\n"
    text.append(said, style="not bold")
    return text


def plans_table(known: Sequence[Contender], problem: Problem) -> Table:
    """The plans with their steps, FLOPs and names."""
    table = Table(title="Plans", title_justify="left", show_lines=True)
    for column in ("", "steps", "FLOPs (counted)", "Run LoRA Run"):
        table.add_column(column, overflow="fold")
    for contender in known:
        steps = f"{contender.title}\n{contender.steps(problem)}"
        letter = Text(f" {contender.letter} ", style=f"black on {colour(contender.letter)}")
        formula = str(contender.flops(problem)).replace(" + ", "\n+ ")
        names = contender.variants.replace(", ", "\n")
        table.add_row(letter, Text(steps), Text(formula), Text(names))
    return table


def borders_table(found: Mapping[str, Sequence[Border]], rank: int) -> Table:
    """The borders between plans, by what the plans are compared by."""
    table = Table(title="Break-even", title_justify="left")
    for column in ("compared by", "plans", "the second costs less from N =", f"at rank {rank}"):
        table.add_column(column, overflow="fold")
    for title, borders in found.items():
        for border in borders:
            plans = f"{border.below} -> {border.above}"
            table.add_row(title, plans, Text(border.formula), f"{border.at_rank:.0f}")
    return table


def timed_table(timed: Sequence[Timed]) -> Table:
    """Measured times of plans, in milliseconds."""
    table = Table(title="Products measured on this machine, ms", title_justify="left")
    for column in ("tokens", "rank", *timed[0].seconds, "fastest", "predicted"):
        table.add_column(column, justify="right")
    for point in timed:
        times = [f"{1e3 * seconds:.2f}" for seconds in point.seconds.values()]
        table.add_row(f"{point.tokens}", f"{point.rank}", *times, point.fastest, point.predicted)
    return table


def _short(size: int) -> str:
    return f"{size / 1024:.3g}k" if size >= 1024 else f"{size}"
