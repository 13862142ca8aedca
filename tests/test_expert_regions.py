"""Experts' weights are planned and written as all others are: options, sizes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from checks import RUNLORA_EAGER, assert_same_outputs_and_grads, ours
from mixtures import EXPERTS, FFN, HIDDEN
from test_experts import Picked, merges
from test_grouped import Grouped, ends, rows
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx
from runlora_fx.history import collecting
from runlora_fx.report.data import Site

INDEX = torch.tensor([3, 0, 0, 2, 3, 3])


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    torch._dynamo.reset()


def picked_site(**options: Any) -> Site:
    """The site of six tokens that pick their weights, in training."""
    model = Picked(from_left=False, transposed=False)
    x = torch.randn(6, HIDDEN, dtype=torch.float64).requires_grad_(True)
    runlora_fx.joint_graph(model, (x, INDEX), strict=True, **options)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    return site


def test_merge_picks_products_and_gradients_are_one_site() -> None:
    site = picked_site(objective="flops")
    assert site.before.splitlines()[:2] == ["M = (W + 2 A B)[k]", "Y = X M"]
    assert site.after.splitlines()[:2] == ["Z = X A[k]", "Y = X W[k] + 2 Z B[k]"]
    assert "dB = 2 sum_k(Z' dY)" in site.after.splitlines()
    assert "N=6" in site.shapes
    assert "E=4" in site.shapes


def test_a_margin_holds_back() -> None:
    saved = 1 - picked_site(objective="flops").flops_after / picked_site().flops_before
    assert picked_site(objective="flops", margin=saved - 0.01).changed
    held_back = picked_site(objective="flops", margin=saved + 0.01)
    assert not held_back.changed
    assert "margin" in held_back.reason


def test_a_rank_that_the_operator_does_not_take_is_a_reason() -> None:
    model, x = Grouped(transposed=False, rank=4), rows(HIDDEN)
    runlora_fx.joint_graph(model, (x, ends()), strict=True, objective="flops")
    report = runlora_fx.last_report()
    assert report is not None
    assert "multiples of 8, not 4" in report.sites[0].reason
    shape = next(cause for cause in report.sites[0].causes if cause.name == "shape")
    assert "multiples of 8, not 4" in shape.text
    assert "multiples" in shape.remedy


def test_printed_reports_show_picks() -> None:
    picked_site()
    assert "W[k]" in str(runlora_fx.last_report())


def test_numbers_of_picks_that_vary_have_two_graphs() -> None:
    """As for grouped products: one guard, where both forms cost the same."""
    model = Picked(from_left=False, transposed=False)
    run = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, dynamic=True, options=ours())
    counters.clear()
    with torch.no_grad(), collecting() as reports:
        for tokens in (6, 300, 9, 170, 171, 2000):
            x, k = torch.randn(tokens, HIDDEN, dtype=torch.float64), torch.arange(tokens) % EXPERTS
            torch.testing.assert_close(run(x, k), model(x, k))
    assert counters["stats"]["unique_graphs"] == 2
    few, many = (report.sites[-1] for report in reports)
    assert few.changed
    assert not many.changed
    assert few.break_even.endswith(">= 171")


@pytest.mark.parametrize("tokens", [1, 2])
def test_one_token_is_right(tokens: int) -> None:
    model = Picked(from_left=False, transposed=False)
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64).requires_grad_(True)
    compiled = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, INDEX[:tokens]], 1e-12)


def rewritten(fn: Any, inputs: list[Tensor]) -> fx.GraphModule:
    """A traced function, rewritten; it computes the same."""
    gm = make_fx(fn)(*inputs)
    wanted = gm(*inputs)
    found = runlora_fx.rewrite(gm, inputs, strict=True, objective="flops")
    torch.testing.assert_close(found(*inputs), wanted)
    return found


def stack(*shape: int) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64
    )


def test_what_has_no_normal_form_is_a_leaf() -> None:
    """A product of two sums by expert, and a pick of one."""

    def fn(u: Tensor, v: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(EXPERTS, 5, 5, dtype=u.dtype)
        sums = torch.index_put(zeros, [k], torch.bmm(u, v), accumulate=True)
        return torch.bmm(sums, sums), torch.bmm(x, sums[k])

    rewritten(fn, [stack(6, 5, 3), stack(6, 3, 5), INDEX, stack(6, 1, 5)])


def test_an_index_that_changes_between_two_picks_is_two_assignments() -> None:
    def fn(w: Tensor, a: Tensor, b: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        merged = w + torch.bmm(a, b)
        first = torch.bmm(x, merged[k])
        k = k.clone()
        k.add_(1).remainder_(EXPERTS)
        return first, torch.bmm(x, merged[k])

    inputs = [stack(EXPERTS, 64, 48), stack(EXPERTS, 64, 2), stack(EXPERTS, 2, 48)]
    found = rewritten(fn, [*inputs, INDEX, stack(6, 1, 64)])
    assert merges(found.graph) == 0


def test_base_weights_that_train_have_the_gradient_of_the_stack() -> None:
    model = Picked(from_left=False, transposed=False)
    model.weight.requires_grad_(True)
    x = torch.randn(6, HIDDEN, dtype=torch.float64).requires_grad_(True)
    compiled = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, INDEX], 1e-12)


def test_merged_stacks_are_not_priced_as_kept_from_call_to_call() -> None:
    """What is kept is one merged weight, not a batch: a plan may not count on more."""
    model = Picked(from_left=False, transposed=False).eval()
    options = ours(memory="fast", memory_budget=1 << 30, reuse=True, objective="flops")
    run = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=options)
    x = torch.randn(6, HIDDEN, dtype=torch.float64)
    with torch.no_grad(), collecting() as reports:
        torch.testing.assert_close(run(x, INDEX), model(x, INDEX))
    site = reports[0].sites[0]
    assert site.flops_after == 2 * 6 * (HIDDEN * FFN + 4 * (HIDDEN + FFN))
