"""Turns: contenders take their steps one after the other, in one process.

    times = take_turns({"PEFT + Inductor": a, "runlora": b}, rounds=20)
    Ratio.of(times["PEFT + Inductor"], times["runlora"])      ->  1.06 [1.05, 1.07]

Invariant: a ratio compares the steps of one round, so what slows the machine down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import median
from typing import Any

import torch

from runlora_fx.cost_model.devices.registry import entry_of

#: How often an interval contains the true median.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """The ratio of two contenders' times, over the rounds.

    Attributes:
        median: Over the rounds.
        low: Lower end of the interval of the median; the least ratio if the rounds are too few.
        high: Its upper end.
        least: The least ratio of a round.
        most: The largest ratio of a round.
    """

    median: float
    low: float
    high: float
    least: float
    most: float

    @classmethod
    def of(cls, times: Sequence[float], over: Sequence[float]) -> Ratio:
        """The ratios of times to others of the same rounds.

        The interval has order statistics as its ends (David and Nagaraja, Order Statistics, 7.1):
        it assumes nothing about how times are distributed.
        """
        ratios = sorted(a / b for a, b in zip(times, over, strict=True))
        count = len(ratios)
        at = outside(count)
        low, high = ratios[at], ratios[count - 1 - at]
        return cls(median(ratios), low, high, ratios[0], ratios[-1])


def outside(count: int) -> int:
    """How many of some sorted values lie below the interval of their median, and as many above."""
    below = 0.0
    for at in range(count):
        below += comb(count, at) / 2**count
        if below > (1 - CONFIDENCE) / 2:
            return max(at - 1, 0)
    raise ValueError("there are no values")


def seconds(call: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """The time of one of some calls in a row [s]."""
    synchronise = entry_of(device).synchronise
    synchronise(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    synchronise(device)
    return (time.perf_counter() - start) / calls


def take_turns(steps: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The times of each contender's step, by round [s].

    Args:
        steps: By name, what runs a step and returns its time [s].
        rounds: How many steps each of them takes.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    turns = list(steps.items())
    for _ in range(rounds):
        turns.append(turns.pop(0))  # none always follows the same one
        for name, step in turns:
            times[name].append(step())
    return times
