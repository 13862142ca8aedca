"""Causes: why a layer was left alone, by name, and what to do about it; each by a real graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_report import Adapted
from torch import Tensor, nn

import runlora_fx
from runlora_fx.passes.search import allowance, dynamic, frontiers
from runlora_fx.passes.search.decide import decide
from runlora_fx.passes.search.ranges import Range
from runlora_fx.passes.search.varying import Varying
from runlora_fx.report.sites import Site

#: Merging this layer pays from 39 tokens on, counted in FLOPs.
FEW, SOME, MANY = 8, 24, 256


class Layer(nn.Module):
    """An adapted layer without dropout or casts."""

    def __init__(self, width: int = 32, out: int = 48, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.base_layer = nn.Linear(width, out, bias=False, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Linear(width, 8 if width > 32 else 4, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(self.lora_A.out_features, out, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.lora_B(self.lora_A(x))
        return self.base_layer(x) + made


def site_of(model: Callable[..., Any], *inputs: Tensor, **options: Any) -> Site:
    options = {"objective": "flops", "strict": True, **options}
    report = runlora_fx.explain(model, *inputs, **options)
    assert len(report) == 1
    (site,) = report
    if not site.changed:
        for cause in site.causes:
            assert f"({cause.name})" in str(report)
            assert cause.text in str(report)
            assert cause.remedy in str(report)
            assert "; ." not in str(report)
        assert f"left alone: {', '.join(cause.name for cause in site.causes)}  " in str(report)
    return site


def causes(model: Callable[..., Any], *inputs: Tensor, **options: Any) -> dict[str, str]:
    """The remedies by the names of the causes."""
    site = site_of(model, *inputs, **options)
    assert not site.changed
    return {cause.name: cause.remedy for cause in site.causes}


def data(tokens: int, width: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, width, dtype=dtype, requires_grad=True)


def test_what_was_changed_has_no_cause() -> None:
    assert site_of(Layer(), data(MANY)).causes == ()


def test_dropout_and_casts_have_the_base_product_beside_them() -> None:
    for layer, name in (
        (Adapted(0.5, torch.float32), "dropout"),
        (Adapted(0.0, torch.float64), "cast"),
    ):
        site = site_of(layer, data(MANY))
        assert [cause.name for cause in site.causes] == [name]
        assert site.base == "Y0 = X0 W'"
        assert site.base_flops == 2 * MANY * 32 * 48
    assert site_of(Layer(), data(FEW)).base == ""  # it is part of the algebra


def test_too_few_tokens_have_the_break_even_as_remedy() -> None:
    site = site_of(Layer(), data(FEW))
    assert site.break_even == "when N > 38"
    assert causes(Layer(), data(FEW)) == {"tokens": "merging pays when N > 38"}
    assert site_of(Layer(), data(39)).changed


def test_a_symbolic_size_is_named_in_the_remedy() -> None:
    x = data(FEW)
    torch._dynamo.mark_dynamic(x, 0)
    remedy = causes(Layer(), x)["tokens"]
    assert remedy.startswith("merging pays when s") and remedy.endswith(" > 38")


@pytest.mark.parametrize(
    ("options", "remedy"),
    (
        ({}, "set runlora.memory='fast' and a runlora.memory_budget"),
        ({"memory": "low"}, "set runlora.memory='fast' and a runlora.memory_budget"),
        ({"memory": "fast", "memory_budget": 1}, "raise runlora.memory_budget"),
    ),
    ids=str,
)
def test_memory_policies_that_forbid_a_cheaper_order_are_named(
    options: dict[str, Any], remedy: str
) -> None:
    """The merged weight, if it were saved, would serve the forward and the backward."""
    layer, x = Layer(512, 512), data(300, 512)
    found = causes(layer, x, objective="time", device="h100", **options)
    assert found["memory"].startswith(remedy)
    given = {"memory": "fast", "memory_budget": 1 << 30}
    assert site_of(layer, x, objective="time", device="h100", **given).changed


def test_an_order_beyond_the_allowance_of_low_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowance, "SHARE", -1.0)
    options = {"objective": "time", "device": "h100", "memory": "low"}
    for tokens in (420, 500):
        assert causes(Layer(512, 512), data(tokens, 512), **options) == {"memory": ""}


def test_a_margin_is_named() -> None:
    assert causes(Layer(), data(MANY), margin=0.9) == {"margin": "lower runlora.margin"}


def test_a_tie_is_named() -> None:
    squares = [torch.randn(32, 32) for _ in range(3)]
    assert causes(lambda x, a, b: x @ a @ b, *squares) == {"tie": ""}


def test_shapes_are_named() -> None:
    inputs = [torch.randn(size) for size in ((MANY, 32), (32, 4), (4, 48))]
    assert causes(lambda x, a, b: x @ a @ b, *inputs) == {"shape": ""}


def test_a_rank_as_large_as_the_layer_is_named_with_one_that_pays() -> None:
    def site(rank: int) -> Site:
        inputs = [torch.randn(size) for size in ((MANY, 32), (32, rank), (rank, 48))]
        return site_of(lambda x, a, b: x @ (a @ b), *inputs)

    (cause,) = site(64).causes
    assert (cause.name, cause.remedy) == ("shape", "with a rank of 16 or less another order pays")
    assert "rank" in cause.text
    assert [site(rank).changed for rank in (16, 32)] == [True, False]


def test_strict_numerics_are_named() -> None:
    layer, x = Layer(dtype=torch.bfloat16), data(MANY, dtype=torch.bfloat16)
    found = causes(layer, x, numerics="strict")
    assert found["numerics"].startswith("set runlora.numerics='default'")
    assert site_of(layer, x).changed


def test_a_search_that_was_cut_short_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontiers, "_EFFORT", 0)
    monkeypatch.setattr(frontiers, "_EFFORT_PER_STEP", 0)
    decide.cache_clear()
    shapes = [(7, 96), *[(96, 96)] * 6]
    inputs = [torch.randn(size) for size in shapes]

    def chain(x: Tensor, *weights: Tensor) -> Tensor:
        for weight in weights:
            x = x @ weight
        return x

    site = site_of(chain, *inputs)
    decide.cache_clear()
    assert not site.is_exact
    assert "limit" in [cause.name for cause in site.causes]


def test_a_plan_that_does_not_serve_all_sizes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_range(problems: dict[Varying, int]) -> list[Range]:
        return [Range(1, None, dict.fromkeys(problems))]

    monkeypatch.setattr(dynamic, "ranges", one_range)
    x = data(MANY)
    torch._dynamo.mark_dynamic(x, 0)
    assert causes(Layer(), x) == {
        "range": "compile with dynamic=False if the sizes are always the same"
    }


def test_causes_are_found_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some take searches. A compilation does without."""
    (site,) = runlora_fx.explain(Layer(), data(SOME), objective="flops", strict=True)

    def fails(*_: object) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr("runlora_fx.report.describe.price_causes.holding_more", fails)
    assert site.causes == ()
    (again,) = runlora_fx.explain(Layer(), data(SOME), objective="flops", strict=True)
    monkeypatch.undo()
    assert {cause.name for cause in again.causes} == {"memory", "tokens"}
