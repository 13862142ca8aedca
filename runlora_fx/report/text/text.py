"""The report as text: a table of the sites, the formulas of each order, and what was left alone.

Example, for the key and value projections of three layers::

    Matrix products of the joint graph: 906.2 MFLOP -> 824.2 MFLOP (-9.0%)

    row  layers  sizes                       products                 ...  order  modules
      1       6  N=1024, i=384, o=128, r=32  302 MFLOP -> 274.7 MFLOP ...  a      model.layers...

    Order a: 6 layers in row 1
      before: 4*N*i*o + 6*N*i*r + 6*N*o*r FLOP
        Z = X A'
        ...

Invariant: everything that was changed has a row, every module has its name in one, and no formula
is printed twice. The text says nothing beyond the data.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from textwrap import shorten
from typing import TypeVar

from runlora_fx.report.gathered import gathered
from runlora_fx.report.kinds import Row, rows_of
from runlora_fx.report.sites import Refusal, Site
from runlora_fx.report.text.formulas import changes
from runlora_fx.report.units import change, count, quantity

_K = TypeVar("_K", bound=Hashable)

#: What the letters of a plan stand for.
LEGEND = """\
X input, Y output, W weight, A and B adapter, b bias, g vector, s scaling, L other matrices;
M computed from weights alone, Z other intermediate results; dX gradient of X, X' X transposed;
X0 and Y0 input and result of the base product, where the adapter reads another input.
N tokens, i inputs, o outputs, r rank, E experts, k the experts of the tokens.
"""

#: The first line where nothing was found.
NOTHING_FOUND = "NO low-rank site found in this graph; it runs as it came."

#: The heads of the table's columns; numbers are aligned to the right.
HEADS = ("row", "layers", "sizes", "products", "time", "saved", "result", "order", "modules")
NUMBERS = frozenset(["row", "layers", "time", "saved"])

#: What the columns with percents say.
COLUMNS = "time: predicted change; saved: change of the bytes that are saved for the backward."

#: Causes that a break-even says nothing about, or is said by.
_WITHOUT_BREAK_EVEN = frozenset(["dropout", "cast", "tokens"])

#: How many alternatives a section shows, and the longest text of one [characters].
_ALTERNATIVES, _WIDTH = 4, 80


def cells(row: Row) -> tuple[str, ...]:
    """The cells of a row of the table, but for the names of its modules."""
    site = row.site
    products = quantity(site.flops_before, "FLOP")
    if site.changed:
        products += f" -> {quantity(site.flops_after, 'FLOP')}"
    gains = [
        change(*pair) if site.changed and pair is not None else ""
        for pair in (site.seconds, site.saved)
    ]
    what = str(row.number), str(row.layers), site.shapes, products
    return (*what, *gains, row.result, row.order)


def total(graph: str, flops_before: int, flops_after: int) -> str:
    """The FLOPs of all matrix products, in a line."""
    pair = (quantity(flops, "FLOP") for flops in (flops_before, flops_after))
    changed = change(flops_before, flops_after) or "nothing to do"
    return f"Matrix products of the {graph} graph: {' -> '.join(pair)} ({changed})"


def lines(sites: Sequence[Site], refusals: Sequence[Refusal]) -> Iterator[str]:
    """The lines of a report, after its summary.

    Args:
        sites: What was found, in graph order.
        refusals: What was left alone although it looks like LoRA.
    """
    rows = rows_of(sites)
    if rows:
        yield ""
        yield from _table(rows)
        for order in dict.fromkeys(row.order for row in rows):
            yield ""
            yield from _section(order, [row for row in rows if row.order == order])
    for refusal in refusals:
        yield ""
        yield f"left alone: {refusal_text(refusal)}"
    if rows:
        yield ""
        yield COLUMNS
        yield from LEGEND.splitlines()


def refusal_text(refusal: Refusal) -> str:
    """Why something was left alone, what to do, and where it is."""
    remedy = refusal.cause.remedy if refusal.cause is not None else ""
    why = f"{refusal.reason}; {remedy}" if remedy else refusal.reason
    return f"{why}: {', '.join(gathered(refusal.nodes))}"


def stacked_text(stacks: Sequence[int]) -> str:
    """A sentence about products that run as one.

    Args:
        stacks: By stack, how many products became one.
    """
    return (
        f"{sum(stacks)} products run as {len(stacks)}: those that became one read the same tensor "
        f"or are added up."
    )


def upcast_text(products: int) -> str:
    """A sentence about products of 16-bit matrices that run in float32.

    Args:
        products: How many.
    """
    return (
        f"{count(products, 'product')} of 16-bit matrices run in float32, which is faster by the "
        f"rates that were measured here; operands are cast, and results are rounded to 16 bits."
    )


def details(rows: Sequence[Row]) -> Iterator[str]:
    """What was decided about rows of one order, and what else was considered."""
    for reason, of in _by(rows, lambda row: row.site.reason):
        yield f"{_rows(of)}: {reason}"
    for text, of in _by(rows, _break_even):
        if text:
            yield f"{_rows(of)}: merging the adapter pays {text}"
    for forms, of in _by(rows, lambda row: tuple(c.form for c in row.site.considered)):
        for i, form in enumerate(forms[:_ALTERNATIVES]):
            if i == 0:
                yield f"{_rows(of)}: considered, by first step"
            flops = (quantity(row.site.considered[i].flops, "FLOP") for row in of)
            short = shorten(form, _WIDTH, placeholder=" ...")
            yield f"  {short}: {', '.join(flops)}"


def _table(rows: Sequence[Row]) -> Iterator[str]:
    """The table: columns of equal width, but for the last."""
    table = [HEADS, *((*cells(row), ", ".join(row.names)) for row in rows)]
    shown = [i for i, head in enumerate(HEADS) if any(cell[i] for cell in table[1:])]
    widths = [max(len(cell[i]) for cell in table) for i in range(len(HEADS))]
    for cell in table:
        padded = (
            cell[i].rjust(widths[i]) if HEADS[i] in NUMBERS else cell[i].ljust(widths[i])
            for i in shown[:-1]
        )
        yield "  ".join([*padded, cell[-1]])


def _section(order: str, rows: Sequence[Row]) -> Iterator[str]:
    """The formulas of an order, and what was decided about its rows."""
    site = rows[0].site
    yield f"Order {order}: {count(sum(row.layers for row in rows), 'layer')} in {_rows(rows)}"
    if site.base:
        flops = ", ".join(dict.fromkeys(quantity(row.site.base_flops, "FLOP") for row in rows))
        yield f"  base product, runs as it came and is added to Y: {flops}"
        yield f"    {site.base}"
    came = "before" if all(row.site.changed for row in rows) else "as it came"
    yield f"  {came}: {site.flops_before_expr} FLOP"
    yield from (f"    {line}" for line in site.before.splitlines())
    changed = [row for row in rows if row.site.changed]
    for after, of in _by(changed, lambda row: row.site.after):
        where = "" if len(of) == len(rows) else f", {_rows(of)}"
        yield f"  after{where}: {of[0].site.flops_after_expr} FLOP"
        new, kept = changes(site.before, after)
        yield from (f"    {line}" for line in new)
        if kept:
            yield f"    {', '.join(kept)} as before"
    yield from (f"  {line}" for line in details(rows))


def _break_even(row: Row) -> str:
    """For which sizes merging pays, if that is not said as a remedy."""
    names = {cause.name for cause in row.site.causes}
    return "" if names & _WITHOUT_BREAK_EVEN else row.site.break_even


def _by(rows: Sequence[Row], key: Callable[[Row], _K]) -> Iterator[tuple[_K, list[Row]]]:
    """Rows by what a function says of them."""
    found: dict[_K, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    return iter(found.items())


def _rows(rows: Iterable[Row]) -> str:
    """``row 2``, or ``rows 1, 2 and 5``."""
    *numbers, last = (str(row.number) for row in rows)
    return f"rows {', '.join(numbers)} and {last}" if numbers else f"row {last}"
