"""Every flavour of the registry, trained: values, graphs, costs, and the published table."""

from functools import cache
from importlib.util import find_spec

import pytest
from checks import INDUCTOR, RUNLORA, assert_same_values, relative_error
from flavours import FLAVOURS
from flavours_table import TABLE, parse, row
from trainings import Trained, compiled, eager

every_flavour = pytest.mark.parametrize("name", FLAVOURS)


@cache
def trained(name: str, backend: str) -> Trained:
    for package in FLAVOURS[name].needs:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    flavour = FLAVOURS[name]
    return eager(flavour) if backend == "eager" else compiled(flavour, backend)


@every_flavour
def test_trains_as_in_eager_mode(name: str) -> None:
    """Outputs, gradients and parameters of every step."""
    found, wanted = trained(name, RUNLORA), trained(name, "eager")
    for step, values in enumerate(wanted.values):
        assert_same_values(found.values[step], values, FLAVOURS[name].rtol)


@every_flavour
def test_the_steps_are_steps(name: str) -> None:
    """Every gradient is there, and weights move by much more than the errors that are allowed."""
    values = trained(name, "eager").values
    grads = {key for step in values for key in step if key.startswith("gradient of ")}
    assert grads
    for key in grads:
        assert any(key in step and step[key].abs().max() > 0 for step in values), key
    first, last = values[0], values[-1]
    state = [key for key in first if not key.startswith(("output ", "gradient of ", "loss"))]
    assert max(relative_error(last[key], first[key]) for key in state) > 1e-3


@every_flavour
def test_graphs_are_no_more_than_under_inductor(name: str) -> None:
    """Graphs, recompilations and graph breaks."""
    found, inductor = trained(name, RUNLORA), trained(name, INDUCTOR)
    assert found.graphs == inductor.graphs
    assert found.breaks == inductor.breaks


@every_flavour
def test_costs_are_as_the_entry_says(name: str) -> None:
    """FLOPs of matrix products fall, or do not change; never more is held for the backward."""
    flavour, found, inductor = FLAVOURS[name], trained(name, RUNLORA), trained(name, INDUCTOR)
    if flavour.expects == "gain":
        assert found.products < inductor.products
        assert found.matched[0] > 0
    else:
        assert found.products == inductor.products
    assert found.saved <= inductor.saved + int(str(flavour.options.get("memory_budget", 0)))


@every_flavour
def test_the_published_table_agrees(name: str) -> None:
    """`docs/flavours.md` says what is measured here."""
    measured = row(name, trained(name, INDUCTOR), trained(name, RUNLORA))
    assert parse(TABLE.read_text(encoding="utf-8"))[name] == measured


def test_the_published_table_has_no_other_rows() -> None:
    assert list(parse(TABLE.read_text(encoding="utf-8"))) == list(FLAVOURS)


@pytest.mark.parametrize("name", [name for name, flavour in FLAVOURS.items() if flavour.kernels])
@pytest.mark.parametrize("backend", (INDUCTOR, RUNLORA))
def test_generated_kernels_do_the_same(name: str, backend: str) -> None:
    """With Inductor's kernels: the same values, graphs and saved bytes as without."""
    found, known = compiled(FLAVOURS[name], backend, kernels=True), trained(name, backend)
    for step, values in enumerate(trained(name, "eager").values):
        assert_same_values(found.values[step], values, FLAVOURS[name].rtol)
    assert (found.graphs, found.saved) == (known.graphs, known.saved)
