"""A PEFT Llama whose sequences have all lengths: two plans, two graphs, and no recompilation more.

Training runs in two processes, one after the other, that share a new cache folder: what guards a
graph has to survive there. Generation has one plan for the prompt and one for single tokens.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import market
import pytest
import torch
import torch._functorch.config as functorch_config
from checks import RUNLORA, RUNLORA_EAGER, ours, scalar_kernels
from market import MODELS, VOCAB
from torch._inductor import config

from runlora_fx.history import collecting

# --- training

BATCH = 2
SHORT, LONG = (5, 6, 7, 8, 9), (44, 45, 46, 47, 48)
# There and back, twenty times.
LENGTHS = [length for pair in zip(SHORT * 4, LONG * 4, strict=True) for length in pair]

SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
from torch._inductor import config

import checks, market
from runlora_fx.history import collecting

lengths, batch = json.loads(sys.argv[1])
market.LAYERS = 1
config.cpp.simdlen = 1
torch._dynamo.config.recompile_limit = 2
torch._dynamo.config.fail_on_recompile_limit_hit = True
model = market.MODELS["llama"].model(rank=8)
options = {"runlora.strict": True}
compiled = torch.compile(model, backend="runlora", dynamic=True, fullgraph=True, options=options)
errors = []
with collecting() as reports:
    for i, length in enumerate(lengths):
        tokens = torch.randint(
            3, market.VOCAB, (batch, length), generator=torch.Generator().manual_seed(i)
        )
        given = {"input_ids": tokens, "labels": tokens}
        wanted = checks.run_training(model, given)
        found = checks.run_training(compiled, given)
        assert found.keys() == wanted.keys()
        errors.append(max(checks.relative_error(found[k], wanted[k]) for k in wanted))
cached = {**counters["inductor"], **counters["aot_autograd"]}
print("RESULT", json.dumps({
    "errors": errors,
    "graphs": counters["stats"]["unique_graphs"],
    "counts": {name: n for name, n in cached.items() if "cache_" in name},
    "from_cache": [report.from_cache for report in reports],
    "sites": [
        [(site.changed, site.after, site.reason, site.break_even) for site in report.sites]
        for report in reports
    ],
}))
"""


@dataclass(frozen=True)
class Outcome:
    """What a process says of its training.

    Attributes:
        errors: By step, the largest relative error of loss, logits and gradients.
        graphs: How many graphs Dynamo traced.
        counts: What Inductor and AOTAutograd counted of their caches.
        from_cache: By compilation, what the report says.
        sites: By compilation and site: changed, the algebra that runs, reason, break-even.
    """

    errors: list[float]
    graphs: int
    counts: Mapping[str, int]
    from_cache: list[bool]
    sites: list[list[tuple[bool, str, str, str]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Outcome]:
    """The same training in two processes, the second with what the first compiled."""
    cache = tmp_path_factory.mktemp("inductor")

    def run() -> Outcome:
        paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps([LENGTHS, BATCH])],
            env={
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(cache),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            cwd=cache,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        (line,) = (x for x in done.stdout.splitlines() if x.startswith("RESULT "))
        return Outcome(**json.loads(line.removeprefix("RESULT ")))

    return run(), run()


@pytest.mark.slow
def test_lengths_on_both_sides_of_the_break_even_make_two_graphs(
    runs: tuple[Outcome, Outcome],
) -> None:
    first, _ = runs
    assert len(first.errors) == len(LENGTHS) == 40
    assert first.graphs == 2
    assert first.from_cache == [False, False]
    # A forward and a backward each. The second graph finds the first, and may not have it.
    assert first.counts["fxgraph_cache_miss"] == 4
    assert first.counts["autograd_cache_saved"] == 2
    assert first.counts["autograd_cache_guard_miss"] == 1
    assert "autograd_cache_hit" not in first.counts


@pytest.mark.slow
def test_the_two_graphs_have_the_plans_of_their_sides(runs: tuple[Outcome, Outcome]) -> None:
    short, long = runs[0].sites
    assert len(short) == len(long) == 7
    merged = "Y = X (W' + s A' B')"  # under dynamic=True the scaling is a symbol, too
    assert any(merged in after for _, after, _, _ in long)
    assert not any(merged in after for _, after, _, _ in short)
    for (_, _, below, _), (_, _, above, _) in zip(short, long, strict=True):
        (border,) = re.findall(r"s\d+\*s\d+ < (\d+)", below)
        assert BATCH * max(SHORT) < int(border) <= BATCH * min(LONG)
        assert re.search(rf"s\d+\*s\d+ >= {border}\b|{border} <= s\d+\*s\d+ < \d+", above)


@pytest.mark.slow
def test_every_length_trains_as_eager_does(runs: tuple[Outcome, Outcome]) -> None:
    for run in runs:
        assert max(run.errors) < 2e-5


@pytest.mark.slow
def test_the_next_process_is_served_both_graphs_and_keeps_their_guards(
    runs: tuple[Outcome, Outcome],
) -> None:
    first, second = runs
    assert second.graphs == first.graphs
    assert second.counts["autograd_cache_hit"] == 2
    assert second.counts["fxgraph_cache_hit"] == 4
    assert not {"autograd_cache_saved", "fxgraph_cache_miss"} & second.counts.keys()
    assert second.from_cache == [True, True]
    assert second.errors == first.errors


@pytest.mark.slow
def test_the_report_says_from_how_many_tokens_on_it_merges(
    runs: tuple[Outcome, Outcome],
) -> None:
    first, _ = runs
    condition = r"(when s\d+\*s\d+ > \d+|never|always)"
    for sites in first.sites:
        for _, _, _, said in sites:
            assert re.fullmatch(
                rf"({condition}|in the forward {condition}, in the backward {condition})",
                said,
            ), said


# --- generation


@scalar_kernels
@config.patch({"fx_graph_cache": False, "aot_inductor.debug_compile": True})  # g++ -O0
@functorch_config.patch(enable_autograd_cache=False)
@pytest.mark.parametrize("backend", (pytest.param(RUNLORA_EAGER, marks=pytest.mark.slow), RUNLORA))
def test_prompt_and_single_tokens_have_plans_of_their_own(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setattr(market, "LAYERS", 1)
    model = MODELS["llama"].model(rank=8).eval()
    base = model.get_base_model()
    base.config.use_cache = True
    prompt = torch.randint(3, VOCAB, (2, 36), generator=torch.Generator().manual_seed(0))

    def generate() -> torch.Tensor:
        tokens = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=8,
            min_new_tokens=8,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
        )
        assert isinstance(tokens, torch.Tensor)
        return tokens

    wanted = generate()
    base.compile(backend=backend, dynamic=True, options=ours())
    with collecting() as reports:
        found = generate()
    assert torch.equal(found, wanted)
    assert found.shape == (2, 36 + 8)

    prefill, *decode = reports
    # One for all lengths of the cache. The cache that Inductor's prompt leaves has other strides
    # than the later ones: one graph more, as under plain Inductor.
    assert 1 <= len(decode) <= (2 if backend == RUNLORA else 1)
    for report in reports:
        assert (report.graph, report.from_cache, len(report.sites)) == ("inference", False, 7)
    # 72 tokens are more than in * out / (in + out) of every layer, 2 are less.
    assert {site.after for site in prefill.sites} == {"Y = X (W' + s A' B')"}
    for report in decode:
        assert {site.after for site in report.sites} == {"Y = X W' + s (X A') B'"}
        assert not any(site.changed for site in report.sites)

    with torch._dynamo.config.patch(error_on_recompile=True), collecting() as again:
        assert torch.equal(generate(), wanted)
    assert not again
