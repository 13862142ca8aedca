"""The report: whatever was changed is in it, in words that are true."""

import copy
import json
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, fx, nn

import runlora_fx
from runlora_fx.passes.context import Recomputation
from runlora_fx.report.data import Report, combined
from runlora_fx.report.describe import describe

IN, OUT, TOKENS = 32, 48, 256


def adapted(config: Any) -> nn.Module:
    """Two layers with adapters that are not zero, for inference."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN))
    model = peft.get_peft_model(layers, config)
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model.eval()


WITHOUT_LOW_RANK_WORDS = {
    "HiRA": lambda: peft.HiraConfig(r=4, target_modules=["0", "2"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, target_modules=["0", "2"]),
    "LoKr": lambda: peft.LoKrConfig(r=4, target_modules=["0", "2"]),
}


@pytest.mark.parametrize("name", WITHOUT_LOW_RANK_WORDS)
def test_what_was_changed_is_reported(name: str) -> None:
    """The update is a matrix of full rank, and the input multiplies two matrices of one shape."""
    if not hasattr(peft, "HiraConfig") and name == "HiRA":
        pytest.skip("this PEFT has no HiRA")
    model, x = adapted(WITHOUT_LOW_RANK_WORDS[name]()), torch.randn(TOKENS, IN)
    with torch.no_grad():
        report = runlora_fx.explain(model, x, objective="flops", strict=True)
    assert report.flops_after < report.flops_before
    assert [site.changed for site in report.sites] == [True, True]
    text = str(report)
    assert "NO low-rank site" not in text
    assert report.flops_before - report.flops_after == sum(
        site.flops_before - site.flops_after for site in report.sites
    )
    assert all("X (W" in site.after for site in report.sites)


def two_weights(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return x @ w + x @ v


@pytest.mark.parametrize(("tokens", "is_site"), ((TOKENS, True), (1, False)))
def test_a_region_without_low_rank_words_is_a_site_where_it_changes(
    tokens: int, is_site: bool
) -> None:
    inputs = [torch.randn(size) for size in ((tokens, IN), (IN, OUT), (IN, OUT))]
    margin = 0.1 if is_site else 0.9
    gm = fx.symbolic_trace(two_weights)
    runlora_fx.rewrite(gm, inputs, objective="flops", margin=margin)
    report = runlora_fx.last_report()
    assert report is not None
    assert [(site.changed, site.is_exact) for site in report.sites] == [(True, True)] * is_site


def test_a_bias_is_a_letter_and_its_broadcast_is_left_out() -> None:
    def layer(x: Tensor, a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return (x @ a + bias) @ b @ b.t()

    inputs = [torch.randn(size) for size in ((TOKENS, IN), (IN, 64), (64, OUT), (64,))]
    runlora_fx.rewrite(fx.symbolic_trace(layer), inputs, objective="flops", strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    assert (site.before, site.after) == (
        "Y = ((L1 L2 + b) L3) L3'",
        "Y = L1 ((L2 L3) L3') + (b L3) L3'",
    )
    assert "1" not in [size.partition("=")[2] for size in site.shapes.split(", ")]


@pytest.mark.parametrize("most", [1_000, 0])
def test_a_break_even_is_said_where_it_takes_little_work(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x @ w + x @ a @ b

    monkeypatch.setattr(describe, "MOST_EFFORT", most)
    inputs = [torch.randn(size) for size in ((TOKENS, IN), (IN, OUT), (IN, 4), (4, OUT))]
    runlora_fx.rewrite(fx.symbolic_trace(layer), inputs, objective="flops", strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    assert [bool(site.break_even) for site in report.sites] == [most > 0]


def test_two_base_weights_in_a_row_are_no_adapter() -> None:
    """``X W1 W2`` has three factors, but only those of the low rank between are called A and B."""

    def chain(x: Tensor, w: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        y = x @ w + x @ a @ b
        return y @ v

    shapes = ((TOKENS, 48), (48, 48), (48, 48), (48, 4), (4, 48))
    inputs = [torch.randn(size) for size in shapes]
    runlora_fx.rewrite(fx.symbolic_trace(chain), inputs, objective="flops", strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    assert not set("AB") & set(site.before.replace("Y", ""))


def test_equal_layers_are_one_row_with_their_numbers_gathered() -> None:
    model, x = adapted(peft.LoraConfig(r=4, target_modules=["0", "2"])), torch.randn(TOKENS, IN)
    layers = nn.ModuleList([copy.deepcopy(model.base_model.model[0]) for _ in range(3)])

    def run(x: Tensor) -> Tensor:
        return layers[0](x).sum() + layers[1](x.sin()).sum() + layers[2](x.cos()).sum()

    with torch.no_grad():
        text = str(runlora_fx.explain(run, x, objective="flops", strict=True))
    verdict, products, _, head, row, *_ = text.splitlines()
    assert verdict.startswith("runlora: 3 of 3 adapted layers rewritten")
    assert products.startswith("Matrix products of the inference graph: ")
    assert head.split()[:3] == ["row", "layers", "sizes"]
    assert row.split()[:2] == ["1", "3"]
    assert text.count("before: ") == text.count("after: ") == 1
    assert "Order a: 3 layers in row 1\n" in text
    assert text.endswith("k the experts of the tokens.\n")


def test_first_steps_that_differ_read_differently() -> None:
    """A sum of two sums shows which addends belong together."""

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        return x @ w + x @ a @ b + x @ c @ d

    sizes = ((TOKENS, IN), (IN, OUT), (IN, 4), (4, OUT), (IN, 6), (6, OUT))
    inputs = [torch.randn(size) for size in sizes]
    runlora_fx.rewrite(fx.symbolic_trace(layer), inputs, objective="flops", strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    forms = [candidate.form for candidate in report.sites[0].considered]
    assert len(set(forms)) == len(forms) > 2


class Adapted(nn.Module):
    """A linear layer with an adapter in a dtype of its own, which may see dropped-out inputs."""

    def __init__(self, p: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.base_layer = nn.Linear(IN, OUT, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(IN, 4, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(4, OUT, bias=False, dtype=dtype)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        given = nn.functional.dropout(x.to(self.lora_A.weight.dtype), self.p)
        made: Tensor = self.lora_B(self.lora_A(given))
        return self.base_layer(x) + made.to(x.dtype)


@pytest.mark.parametrize(
    ("p", "dtype", "causes"),
    (
        (0.5, torch.float32, ["dropout"]),
        (0.0, torch.float64, ["cast"]),
        (0.5, torch.float64, ["dropout", "cast"]),
        (0.0, torch.float32, []),
    ),
    ids=str,
)
def test_a_report_says_what_keeps_an_adapter_from_being_merged(
    p: float, dtype: torch.dtype, causes: list[str]
) -> None:
    x = torch.randn(TOKENS, IN, requires_grad=True)
    report = runlora_fx.explain(Adapted(p, dtype), x, objective="flops", strict=True)
    sites = [site for site in report.sites if any("lora" in s or "A" in s for s in site.before)]
    assert [cause.name for cause in sites[0].causes] == causes
    first, *lines = str(report).splitlines()
    assert first.startswith("runlora: ")
    assert report.verdict in first
    advice = [line for line in lines if line.startswith("1 layer left alone (")]
    assert len(advice) == len(causes)
    for line, cause in zip(advice, sites[0].causes, strict=True):
        assert cause.text in line and cause.remedy in line


def test_a_verdict_counts_layers_and_predicts_time() -> None:
    layers = nn.Sequential(Adapted(0.0, torch.float32), nn.GELU(), nn.Linear(OUT, IN))
    x = torch.randn(TOKENS, IN, requires_grad=True)
    report = runlora_fx.explain(layers, x, strict=True)
    assert report.seconds is not None
    before, after = report.seconds
    share = (before - after) / before
    assert share > 0
    wanted = f"1 of 1 adapted layer rewritten: {share:.1%} less time of matrix products predicted"
    assert report.verdict.startswith(wanted)


def test_a_verdict_of_several_graphs_adds_what_they_save() -> None:
    parts = [
        Report("joint", seconds=(3.0, 2.0), recomputation=Recomputation(1, 0, 2, 100)),
        Report("joint", seconds=(1.0, 1.0), recomputation=Recomputation(0, 1, 1, 20)),
    ]
    whole = combined(parts)
    assert whole.seconds == (4.0, 3.0)
    assert whole.recomputation == Recomputation(1, 1, 3, 120)
    assert combined([*parts, Report("joint")]).seconds is None


def test_a_report_is_a_sequence_of_sites_and_json() -> None:
    x = torch.randn(TOKENS, IN, requires_grad=True)
    report = runlora_fx.explain(Adapted(0.5, torch.float32), x, objective="flops", strict=True)
    assert len(report) == len(list(report)) == len(report.sites) > 0
    assert bool(Report("no"))
    read = json.loads(report.to_json())
    assert read["schema"] == 1
    assert read["verdict"] == report.verdict
    assert [site["reason"] for site in read["sites"]] == [site.reason for site in report]
    (site, *_) = read["sites"]
    assert site["causes"][0]["name"] == "dropout"
    assert site["flops_before_expr"] == str(report.sites[0].flops_before_expr)
    assert read["recomputation"]["packed"] == 0
    assert read["planning_seconds"] > 0
    assert read["steps_to_pay_back"] is None  # FLOPs ranked the plans
    assert "\n" in report.to_json(indent=1)
