"""Every flavour of the registry, trained: values, graphs, costs, and the published table."""

from functools import cache
from importlib.util import find_spec

import pytest
import torch
from checks import INDUCTOR, RUNLORA, RUNLORA_EAGER, assert_same_values, ours, relative_error
from flavours import CopraLinear, copra, draw, peft, tokens
from flavours_table import TABLE, VERSIONS, parse, row
from registry import FLAVOURS
from trainings import Trained, compiled, eager

import runlora_fx

#: Flavours that compile for long, and whose operators other flavours have too.
LONG = ("X-LoRA", "LoRA on expert weights, batched")

every_flavour = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in LONG else ()) for name in FLAVOURS],
)


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
    assert all(mine <= theirs for mine, theirs in zip(found.graphs, inductor.graphs, strict=True))
    assert found.breaks <= inductor.breaks


@every_flavour
def test_costs_are_as_the_entry_says(name: str) -> None:
    """FLOPs of products fall or do not change; less, or as much, is held for the backward."""
    flavour, found, inductor = FLAVOURS[name], trained(name, RUNLORA), trained(name, INDUCTOR)
    if flavour.expects == "gain":
        assert found.products < inductor.products
        assert found.matched[0] > 0
    else:
        assert found.products == inductor.products
    if flavour.expects == "bytes":
        assert found.saved < inductor.saved
        assert found.matched[0] > 0
    budget = flavour.options.get("memory_budget", 0)
    assert isinstance(budget, int)
    assert found.saved <= inductor.saved + budget


@every_flavour
def test_the_published_table_agrees(name: str) -> None:
    """`docs/flavours.md` says what is measured here."""
    text = TABLE.read_text(encoding="utf-8")
    if VERSIONS not in text:
        pytest.skip(f"the table was not made with {VERSIONS}")
    assert parse(text)[name] == row(name, trained(name, INDUCTOR), trained(name, RUNLORA))


def test_the_published_table_has_a_row_for_every_flavour() -> None:
    rows = parse(TABLE.read_text(encoding="utf-8"))
    assert list(rows) == list(FLAVOURS)
    assert [found.source for found in rows.values()] == [f.source for f in FLAVOURS.values()]


@pytest.mark.parametrize("name", [name for name, flavour in FLAVOURS.items() if flavour.kernels])
def test_generated_kernels_do_the_same(name: str) -> None:
    """With Inductor's kernels: the same values, graphs and saved bytes as without."""
    found, known = compiled(FLAVOURS[name], RUNLORA, kernels=True), trained(name, RUNLORA)
    for step, values in enumerate(trained(name, "eager").values):
        assert_same_values(found.values[step], values, FLAVOURS[name].rtol)
    assert (found.graphs, found.saved) == (known.graphs, known.saved)


def test_autocast_gradients_are_bitwise_eagers_where_nothing_is_reordered() -> None:
    """With few tokens nothing is merged, and the pass must not touch a bit."""
    batch = tokens(torch.bfloat16)["input"][:, :8]
    found = []
    for backend in ("eager", RUNLORA_EAGER):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = peft(torch.bfloat16)
        options = None if backend == "eager" else ours()
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.compile(model, backend=backend, options=options)(batch)
        y.float().square().mean().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append({"output": y, **grads})
    report = runlora_fx.last_report()
    assert report is not None
    assert len(report.sites) == 4
    assert not any(site.changed for site in report.sites)
    for name, wanted in found[0].items():
        assert torch.equal(found[1][name], wanted), name


def test_drops_as_flags_need_two_graphs_for_a_layer() -> None:
    """Compiled layer by layer, a flag has two states, however layers are combined."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, batch = copra(as_flag=True), tokens()["input"]
    layers = [layer for layer in model.modules() if isinstance(layer, CopraLinear)]
    for layer in layers:
        layer.compile(backend=RUNLORA_EAGER, options=ours(objective="flops"))
    for step in range(8):
        draw(model, 0.5, torch.Generator().manual_seed(step))
        model(batch).square().mean().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2 * len(layers)
