"""Layered layout: the boxes of a graph in columns, so that every edge goes to the right.

    edges X -> Z, A -> Z, Z -> Y    ->    columns [X, A], [Z], [Y], and a height for each

The layout has the usual stages: a column for each box, places in the other columns for edges that
cross them, an order within each column that leaves few crossings, then heights near those of the
neighbours.

Invariant: boxes of a column do not overlap, and neither do boxes of two bands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import accumulate, pairwise

#: How often the order within the columns, and then the heights, are improved.
_SWEEPS = 12


@dataclass(frozen=True)
class Node:
    """A box to place.

    Attributes:
        height: Its height, with the space to the next box [px].
        band: Boxes of a larger band lie below all boxes of a smaller one.
        is_source: True if it may be moved next to its first reader.
    """

    height: float
    band: int = 0
    is_source: bool = False


@dataclass(frozen=True)
class Layout:
    """Where the boxes are.

    Attributes:
        columns: By box, its column.
        middles: By box, the height of its middle [px].
        routes: By edge, the heights at which it crosses the columns between its ends [px].
        height: The height of the drawing [px].
        bands: By band, where it begins [px].
    """

    columns: tuple[int, ...]
    middles: tuple[float, ...]
    routes: Mapping[tuple[int, int], tuple[float, ...]]
    height: float
    bands: tuple[float, ...]


def layered(
    nodes: Sequence[Node],
    edges: Sequence[tuple[int, int]],
    gap: float = 0.0,
    crossing: float = 10.0,
) -> Layout:
    """Place the boxes of a graph without cycles.

    Args:
        nodes: The boxes.
        edges: From which box to which; each once.
        gap: The space above every band [px].
        crossing: The height that an edge takes in a column that it crosses [px].
    """
    columns = _columns(nodes, edges)
    placed, links, chains = list(nodes), list[tuple[int, int]](), dict[tuple[int, int], list[int]]()
    where = list(columns)
    for source, target in edges:
        chain = []
        for column in range(columns[source] + 1, columns[target]):
            band = nodes[target].band
            placed.append(Node(crossing, band))
            where.append(column)
            chain.append(len(placed) - 1)
        chains[source, target] = chain
        links += pairwise([source, *chain, target])
    order = _ordered(placed, where, links)
    middles, height, bands = _heights(placed, order, links, gap)
    routes = {edge: tuple(middles[i] for i in chain) for edge, chain in chains.items()}
    return Layout(tuple(columns), tuple(middles[: len(nodes)]), routes, height, bands)


def _columns(nodes: Sequence[Node], edges: Sequence[tuple[int, int]]) -> list[int]:
    """By box, its column: one right of the last box that it reads; sources close to a reader."""
    before: dict[int, set[int]] = {i: set() for i in range(len(nodes))}
    for source, target in edges:
        before[target].add(source)
    columns = [0] * len(nodes)
    for i in TopologicalSorter(before).static_order():
        columns[i] = max((columns[j] + 1 for j in before[i]), default=0)
    for i, node in enumerate(nodes):
        readers = [columns[target] for source, target in edges if source == i]
        if node.is_source and readers:
            columns[i] = min(readers) - 1
    return columns


def _ordered(
    nodes: Sequence[Node], where: Sequence[int], links: Sequence[tuple[int, int]]
) -> list[list[int]]:
    """By column, its boxes from top to bottom: by band, with few crossings."""
    width = max(where, default=-1) + 1
    order = [[i for i, column in enumerate(where) if column == c] for c in range(width)]
    for column in order:
        column.sort(key=lambda i: nodes[i].band)
    best, fewest = [list(column) for column in order], _crossings(order, where, links)
    for sweep in range(_SWEEPS):
        is_rightward = sweep % 2 == 0
        for c in range(width) if is_rightward else reversed(range(width)):
            rank = {i: place for column in order for place, i in enumerate(column)}
            near: dict[int, list[int]] = {i: [] for i in order[c]}
            for source, target in links:
                one, other = (target, source) if is_rightward else (source, target)
                if one in near:
                    near[one].append(rank[other])
            order[c].sort(key=lambda i, n=near, r=rank: (nodes[i].band, _mean(n[i], r[i])))  # type: ignore[misc]
        found = _crossings(order, where, links)
        if found < fewest:
            best, fewest = [list(column) for column in order], found
    return best


def _mean(of: Sequence[float], otherwise: float) -> float:
    return sum(of) / len(of) if of else otherwise


def _crossings(
    order: Sequence[Sequence[int]], where: Sequence[int], links: Sequence[tuple[int, int]]
) -> int:
    """How many pairs of links between the same columns cross."""
    rank = {i: place for column in order for place, i in enumerate(column)}
    count = 0
    for c in range(len(order)):
        here = sorted((rank[s], rank[t]) for s, t in links if where[s] == c)
        count += sum(
            1 for i, (s, t) in enumerate(here) for s2, t2 in here[i + 1 :] if s < s2 and t > t2
        )
    return count


def _heights(
    nodes: Sequence[Node],
    order: Sequence[Sequence[int]],
    links: Sequence[tuple[int, int]],
    gap: float,
) -> tuple[list[float], float, tuple[float, ...]]:
    """By box, the height of its middle; the height of all; and where each band begins."""
    middles, top = [0.0] * len(nodes), 0.0
    near: dict[int, list[int]] = {i: [] for i in range(len(nodes))}
    for source, target in links:
        if nodes[source].band == nodes[target].band:
            near[source].append(target)
            near[target].append(source)
    bands = []
    for band in range(max((node.band for node in nodes), default=-1) + 1):
        bands.append(top)
        here = [[i for i in column if nodes[i].band == band] for column in order]
        members = [i for column in here for i in column]
        if not members:
            continue
        for column in here:
            _spread(nodes, column, middles)
        for sweep in range(_SWEEPS):
            for column in here if sweep % 2 else reversed(here):
                for i in column:
                    middles[i] = _mean([middles[j] for j in near[i]], middles[i])
                _spread(nodes, column, middles)
        least = min(middles[i] - nodes[i].height / 2 for i in members)
        for i in members:
            middles[i] += top + gap - least
        top = max(middles[i] + nodes[i].height / 2 for i in members)
    return middles, top, tuple(bands)


def _spread(nodes: Sequence[Node], column: Sequence[int], middles: list[float]) -> None:
    """Move the boxes of a column apart in their order, each as little as possible.

    Boxes that would overlap form a block at the mean of where they want to be. This minimises the
    sum of the squares of the moves.
    """
    distances = [(nodes[a].height + nodes[b].height) / 2 for a, b in pairwise(column)]
    offsets = list(accumulate(distances, initial=0.0))
    blocks: list[tuple[float, int]] = []  # the mean of a block without offsets, and its size
    for i, offset in zip(column, offsets, strict=False):
        mean, size = middles[i] - offset, 1
        while blocks and blocks[-1][0] > mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    settled = [mean for mean, size in blocks for _ in range(size)]
    for i, offset, mean in zip(column, offsets, settled, strict=False):
        middles[i] = mean + offset
