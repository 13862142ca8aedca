"""Costs as amounts of terms: their arithmetic, and their prices against hand-written formulas."""

import copy
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sympy

from runlora_fx.cost_model import cost, store
from runlora_fx.cost_model.cost import FREE, TERMS, Cost, Term
from runlora_fx.cost_model.devices import registry
from runlora_fx.cost_model.devices.fit import fit
from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.ops import Add, Elementwise, Hold, MatMul
from runlora_fx.cost_model.profile import MachineProfile
from runlora_fx.cost_model.store import Key, Record

# --- the mapping


def test_costs_are_mappings_that_add_and_scale() -> None:
    a, b = Cost({"flops.nn": 3, "launches": 1}), Cost({"flops.nt": 4, "launches": 2, "held": 5})
    both = a + b
    assert dict(both) == {"flops.nn": 3, "launches": 3, "flops.nt": 4, "held": 5}
    assert (both.flops, both.bytes, both.kernels, both.saved) == (7, 0, 3, 5)
    assert both * 2 == 2 * both == both + both
    assert dict(a) == {"flops.nn": 3, "launches": 1}  # as it was
    assert sum([a, b, a], FREE) == a + a + b
    assert a["read"] == 0
    assert "read" not in a


def test_a_term_of_amount_zero_is_as_good_as_none() -> None:
    a, b = Cost({"read": 2, "written": 0}), Cost({"read": 2})
    assert a == b
    assert hash(a) == hash(b)
    assert a != Cost({"read": 3})
    assert Cost({"read": 0}) == FREE


def test_costs_are_symbolic_where_dimensions_are() -> None:
    n = sympy.Symbol("n", positive=True, integer=True)
    total = MatMul(1, n, 8, 4, 2).cost + Add(1, n, 4, 2, 2).cost
    assert total["flops.nn"] == 64 * n
    assert total.bytes == 2 * (12 * n + 32) + 24 * n
    assert (total * n)["launches"] == n


def test_costs_can_be_copied() -> None:
    made = MatMul(2, 3, 4, 5, 4).cost
    assert copy.deepcopy(made) == made


# --- the price, by hand

FLOPS_PER_S, READ_PER_S, WRITE_PER_S, ADD_PER_S, LAUNCH_S = 2e11, 5e10, 1e10, 2e10, 4e-6
SLOWER = {"nn": 1.0, "nt": 1.25, "tn": 2.0}
PROFILE = MachineProfile(
    {
        **{f"flops.{layout}": slower / FLOPS_PER_S for layout, slower in SLOWER.items()},
        "read": 1 / READ_PER_S,
        "written": 1 / WRITE_PER_S,
        "elementwise": 1 / ADD_PER_S,
        "launches": LAUNCH_S,
    }
)
SIZES = list(itertools.product((1, 3), (1, 16, 640), (8, 768), (1, 16, 4096), (2, 4, 8)))
LAYOUTS = {(False, False): "nn", (True, True): "nn", (False, True): "nt", (True, False): "tn"}


@dataclass(frozen=True)
class ByHand:
    """What a product or something else costs, written out."""

    operation: Any
    seconds: float
    flops: int
    moved: int
    held: int = 0


def by_hand() -> list[ByHand]:
    found = []
    for b, m, k, n, size in SIZES:
        for turned, layout in LAYOUTS.items():
            flops, read, written = 2 * b * m * k * n, size * b * (m * k + k * n), size * b * m * n
            seconds = flops * (SLOWER[layout] / FLOPS_PER_S) + read / READ_PER_S
            seconds += written / WRITE_PER_S + LAUNCH_S
            product = MatMul(b, m, k, n, size, turned)
            found.append(ByHand(product, seconds, flops, read + written))
        for parts in (2, 5):
            moved = 3 * b * m * n * (parts - 1) * size
            found.append(ByHand(Add(b, m, n, parts, size), moved / ADD_PER_S, 0, moved))
        moved = 2 * b * m * n * size
        found.append(ByHand(Elementwise(moved), moved / ADD_PER_S, 0, moved))
        found.append(ByHand(Hold(b, m, n, size), 0.0, 0, 0, b * m * n * size))
    return found


@pytest.mark.parametrize("weight", (0, 8192), ids=("balanced", "low"))
def test_prices_are_those_of_the_formulas(weight: int) -> None:
    time = Objective("time", profile=PROFILE, flops_per_saved_byte=weight)
    flops = Objective("flops", profile=PROFILE, flops_per_saved_byte=weight)
    for known in by_hand():
        held = known.held * weight
        assert time.price(known.operation) == pytest.approx(
            known.seconds + held / FLOPS_PER_S, rel=1e-14
        )
        assert PROFILE.seconds(known.operation) == pytest.approx(known.seconds, rel=1e-14)
        exact = (known.flops + held << 80) + known.moved + known.held
        assert flops.price(known.operation) == exact
        made = known.operation.cost
        assert (made.flops, made.bytes, made.saved) == (known.flops, known.moved, known.held)
        assert made.kernels == isinstance(known.operation, MatMul)


def test_only_products_take_the_time_that_was_measured_and_only_of_time() -> None:
    product = MatMul(1, 8, 16, 32, 4, (False, True))
    profile = MachineProfile(PROFILE.known, ((product.shape, 123.0),))
    assert Objective("time", profile=profile).price(product) == 123.0
    assert Objective("flops", profile=profile).price(product) < 1 << 100


# --- a new term


@dataclass(frozen=True)
class Gather:
    """An operation that nobody knew before: rows of a table, picked one by one."""

    rows: int

    @property
    def cost(self) -> Cost:
        return Cost({"gathered": 4 * self.rows, "launches": 1})


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> Term:
    """The one line that a new term is."""
    term = Term("gathered", "bytes", "B read row by row", like="read")
    monkeypatch.setitem(cost.TERMS, "gathered", term)
    return term


@pytest.mark.usefixtures("gathered", "no_profile")
def test_a_new_term_is_priced_fitted_and_stored() -> None:
    rows: Callable[[int], Any] = Gather
    # Where nobody measured it, it takes as long as what it is like.
    before = MachineProfile(PROFILE.known)
    assert before.seconds(rows(100)) == pytest.approx(400 / READ_PER_S + LAUNCH_S)
    assert Objective("flops").price(rows(100)) == 400
    # Calibration fits it.
    times = {rows(n): 400e-12 * n + 2e-6 for n in (100, 1000, 10_000)}
    found = fit(times)
    assert found == pytest.approx({"gathered": 1e-10, "launches": 2e-6})
    # Files keep it.
    key = Key("a device", "float32", "2.13.0", "threads=1")
    store.add(key, Record(found))
    after = store.load(key).profile(before)
    assert after.seconds(rows(100)) == pytest.approx(times[rows(100)])
    assert after.seconds_per["read"] == before.seconds_per["read"]


def test_every_operation_mentions_known_terms_only() -> None:
    for known in by_hand()[:9]:
        assert set(known.operation.cost) <= TERMS.keys()
    for name, term in TERMS.items():
        assert name == term.name
        assert term.like is None or list(TERMS).index(term.like) < list(TERMS).index(name)


# --- the documentation

DOCUMENT = Path(__file__).parent.parent / "docs" / "cost-model.md"


def test_the_tables_of_terms_and_devices_are_complete() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    terms = re.findall(
        r"^\| `([\w.]+)` \| (?:FLOP|B|kernel|element) \|.*?(?:`([\w.]+)` )?\|$", text, re.MULTILINE
    )
    assert dict(terms) == {name: term.like or "" for name, term in TERMS.items()}
    table = text[text.index("| device | model |") :]
    devices = re.findall(r"^\| `(\w+)` \|", table[: table.index("\n\n")], re.MULTILINE)
    assert sorted(devices) == sorted([*registry.entries(), "unknown"])
