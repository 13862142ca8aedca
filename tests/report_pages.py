"""Reports whose pages are tested: a small model with changed layers and one that is left alone."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import runlora_fx
from runlora_fx.report.data import Report
from runlora_fx.report.html.kinds import kinds_of
from runlora_fx.report.sites import Refusal

IN, OUT, RANK, TOKENS = 64, 96, 4, 512

#: A name that would run a script if it were not escaped.
HOSTILE = "layers.0.<img src=x onerror=\"document.title='run'\">.'&amp;"


class Adapted(nn.Module):
    """A linear layer with an adapter."""

    def __init__(self, width: int = OUT, p: float = 0.0) -> None:
        super().__init__()
        self.base_layer = nn.Linear(IN, width, bias=False).requires_grad_(False)
        self.lora_A = nn.Linear(IN, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, width, bias=False)
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        dropped = nn.functional.dropout(x, self.p)
        made: Tensor = self.lora_B(self.lora_A(dropped))
        return self.base_layer(x) + made


class Model(nn.Module):
    """Two equal layers, a wider one, and one that dropout keeps from being merged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"query": Adapted()}) for _ in range(2))
        self.wide = Adapted(4 * OUT)
        self.dropped = Adapted(2 * OUT, p=0.5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (layer["query"] for layer in self.layers)
        made = (first(x.sin()), second(x.cos()), self.wide(x.exp()), self.dropped(x.tanh()))
        return torch.cat([one.flatten() for one in made]).square().sum()


@cache
def report(objective: str = "time") -> Report:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, IN, requires_grad=True)
    device = "h100" if objective == "time" else ""
    return runlora_fx.explain(Model(), x, objective=objective, device=device, strict=True)


def many(count: int) -> Report:
    """A report of many kinds, made of the sites of one."""
    sites = report().sites
    named = [
        replace(
            sites[i % len(sites)],
            modules=(f"model.layers.{i}.q_proj",),
            reason=f"reason {i}",
            flops_before=(7 * i) % count + 1,
        )
        for i in range(count)
    ]
    return replace(report(), sites=tuple(named))


def hostile() -> Report:
    sites = tuple(replace(site, modules=(HOSTILE,)) for site in report().sites)
    return replace(report(), sites=sites, refusals=(Refusal(HOSTILE, (HOSTILE,)),))


PAGES: dict[str, Callable[[], Report]] = {
    "time": report,
    "flops": lambda: report("flops"),
    "many": lambda: many(32),
    "hostile": hostile,
    "without figures": lambda: replace(
        report(), sites=tuple(replace(site, find_figures=lambda: None) for site in report().sites)
    ),
    "no site": lambda: Report("inference", refusals=(Refusal("a reason", ("a.b",)),)),
    "cached": lambda: Report("cached", from_cache=True),
}


@cache
def page_of(name: str) -> str:
    return PAGES[name]().to_html()


def kinds(objective: str) -> list[Any]:
    return kinds_of(report(objective).sites, report(objective).rates)


def figures_of(name: str, objective: str = "time") -> Any:
    (site,) = (site for site in report(objective) if site.modules == (name,))
    return site.figures
