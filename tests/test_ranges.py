"""Ranges of sizes and break-evens as pure functions, against trying every size.

The problems are LoRA layers as autograd computes them, in which the number of tokens varies.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace

import pytest
from test_search import Shape, lora_layer

from runlora_fx.cost_model.objective import Objective
from runlora_fx.cost_model.profile import DEFAULT_PROFILE, MachineProfile
from runlora_fx.passes.algebra.plan import Plan, incoming_operations
from runlora_fx.passes.algebra.problem import Problem
from runlora_fx.passes.search.decide import decide, saving
from runlora_fx.passes.search.frontiers import search
from runlora_fx.passes.search.ranges import Range, _merges, break_even, ranges
from runlora_fx.passes.search.space import space_of
from runlora_fx.passes.search.varying import COMPARED, SEARCHED, Varying, candidates
from runlora_fx.passes.search.ways import Ways, _listing

TOKENS = frozenset([0])
FLOPS = Objective("flops")
TIME = Objective("time", profile=DEFAULT_PROFILE)
GPU_PROFILE = MachineProfile({"flops.nn": 1 / 6e14, "read": 1 / 2.7e12, "launches": 4e-6})
GPU = Objective("time", profile=GPU_PROFILE)
OBJECTIVES = {"flops": FLOPS, "cpu": TIME, "gpu": GPU}

# in, out, rank
LAYERS = [(64, 64, 8), (64, 128, 8), (768, 768, 128), (4096, 4096, 16), (4096, 1024, 64)]
DENSE = (*range(1, 400), *range(400, 6000, 37), *COMPARED)


def forward_only(problem: Problem) -> Problem:
    """The problem of an inference graph."""
    return replace(
        problem,
        demands=tuple(d for d in problem.demands if not d.backward),
        incoming=tuple((value, step) for value, step in problem.incoming if not value.backward),
        kept=frozenset(),
    )


def varying(layer: tuple[int, int, int], objective: Objective, *, traced: int = 96) -> Varying:
    i, o, r = layer
    shape: Shape = (traced, i, o, r)
    return Varying.of(lora_layer(shape), TOKENS, objective)


def total(
    problems: Mapping[Varying, int], plans: Mapping[Varying, Plan | None], size: int
) -> float:
    return sum(count * v.priced(plans[v], size).price for v, count in problems.items())


every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda sizes: "x".join(map(str, sizes)))

# Models whose layers have break-evens of their own: a few, and many that are far apart.
GRAPHS = (
    {(64, 64, 8): 4, (64, 128, 8): 2, (128, 64, 8): 1},
    {(4096, 4096, 16): 64, (4096, 1024, 64): 32, (64, 64, 8): 1},
    {(256, 1024, 64): 2, (1024, 256, 8): 3, (64, 4096, 4): 5, (2048, 2048, 512): 1},
)


def all_graphs(objective: Objective) -> list[dict[Varying, int]]:
    alone = [{varying(layer, objective): 1} for layer in LAYERS]
    together = [{varying(s, objective): n for s, n in graph.items()} for graph in GRAPHS]
    return [*alone, *together]


@every_objective
def test_ranges_cover_all_sizes_without_gap_or_overlap_and_are_few(objective: Objective) -> None:
    several = 0
    for problems in all_graphs(objective):
        found = ranges(problems)
        assert 1 <= len(found) <= 4
        several += len(found) > 1
        assert found[0].low == 1
        assert found[-1].high is None
        for below, above in itertools.pairwise(found):
            assert below.high == above.low
            assert below.low < above.low
            assert below.plans != above.plans
        for size in (*DENSE, 1 << 20):
            assert sum(r.contains(size) for r in found) == 1
        for r in found:
            assert r.plans.keys() == problems.keys()
    assert several


@every_objective
def test_a_border_is_the_break_even_of_a_layer_to_the_element(objective: Objective) -> None:
    for problems in all_graphs(objective):
        for below, above in itertools.pairwise(ranges(problems)):
            at = above.low
            flips = [
                candidates(v).choice(at) != candidates(v).choice(at - 1)
                or any(
                    candidates(v).is_worth(i, at) != candidates(v).is_worth(i, at - 1)
                    for i in range(len(candidates(v).plans))
                )
                for v in problems
            ]
            assert any(flips)
            assert below.high == at


@every_objective
@every_layer
def test_no_plan_is_dearer_than_the_graph_as_it_came_at_any_size(
    layer: tuple[int, int, int], objective: Objective
) -> None:
    problem = varying(layer, objective)
    for r in ranges({problem: 1}):
        for size in filter(r.contains, DENSE):
            came = problem.priced(None, size).price
            assert problem.priced(r.plans[problem], size).price <= came * (1 + 1e-9), size


@every_objective
@pytest.mark.parametrize("graph", GRAPHS, ids=("alike", "large", "unlike"))
def test_no_layer_of_a_graph_is_dearer_than_it_came_at_any_size(
    graph: dict[tuple[int, int, int], int], objective: Objective
) -> None:
    problems = {varying(sizes, objective): n for sizes, n in graph.items()}
    for r in ranges(problems):
        for size in filter(r.contains, DENSE):
            for problem, plan in r.plans.items():
                came = problem.priced(None, size).price
                assert problem.priced(plan, size).price <= came * (1 + 1e-9), size


def test_layers_with_break_evens_of_their_own_have_borders_of_their_own() -> None:
    layers = {
        Varying.of(forward_only(lora_layer((96, width, width, rank))), TOKENS, FLOPS): count
        for width, rank, count in ((128, 4, 128), (1024, 32, 1))
    }
    found = ranges(layers)
    # Half of the width; there it is a tie, which leaves the graph as it came.
    assert [r.low for r in found] == [1, 65, 513]
    changed = [[plan is not None for plan in r.plans.values()] for r in found]
    assert changed == [[False, False], [True, False], [True, True]]


@every_objective
def test_few_ranges_save_most_of_what_a_plan_for_every_size_would(objective: Objective) -> None:
    for problems in all_graphs(objective):
        found = ranges(problems)
        came = dict.fromkeys(problems)
        ideal = ours = 0.0
        for size in COMPARED:
            before = total(problems, came, size)
            best = sum(
                count * min(v.priced(plan, size).price for plan in candidates(v).plans)
                for v, count in problems.items()
            )
            (inside,) = (r for r in found if r.contains(size))
            ideal += 1 - best / before
            ours += 1 - total(problems, inside.plans, size) / before
        assert ours <= ideal * (1 + 1e-9)
        if len(found) < 4:
            # Moving a border to where the plans cost the same only adds to it.
            assert ours >= 0.9 * ideal - 1e-9


@every_objective
def test_candidates_are_the_best_at_every_size_searched(objective: Objective) -> None:
    problem = varying((768, 768, 128), objective)
    for size in (1, 16, 64, 256, 1024, 4096, 32768):
        sized = replace(problem.problem, dims=(size, *problem.problem.dims[1:]))
        best = problem.objective.total(search(sized, problem.objective).plan.operations(sized))
        least = min(problem.priced(plan, size).price for plan in candidates(problem).plans)
        assert least == pytest.approx(best)


@every_layer
def test_what_was_traced_first_makes_no_difference(layer: tuple[int, int, int]) -> None:
    first = varying(layer, TIME, traced=7)
    for traced in (1, 96, 50_000):
        other = varying(layer, TIME, traced=traced)
        assert other == first
        assert ranges({other: 1}) == ranges({first: 1})


def test_measured_products_do_not_make_holes() -> None:
    measured = tuple(
        (operation.shape, 1e3)
        for operation in incoming_operations(lora_layer((96, 64, 64, 8)))
        if hasattr(operation, "shape")
    )
    assert measured
    objective = replace(TIME, profile=replace(TIME.profile, measured=measured))
    assert varying((64, 64, 8), objective) == varying((64, 64, 8), TIME)


def test_a_margin_keeps_the_graph_as_it_came_where_little_is_saved() -> None:
    layer = (4096, 4096, 16)
    (free,) = [{varying(layer, FLOPS): 1}]
    assert any(plan is not None for r in ranges(free) for plan in r.plans.values())
    strict = varying(layer, replace(FLOPS, margin=0.5))
    assert [list(r.plans.values()) for r in ranges({strict: 1})] == [[None]]


def test_a_graph_that_costs_nothing_at_any_size_stays_as_it_came() -> None:
    free = Varying.of(forward_only(lora_layer((96, 0, 0, 0))), TOKENS, FLOPS)
    (only,) = ranges({free: 2})
    assert only.plans == {free: None}


def test_a_range_says_what_it_holds_for() -> None:
    for low, high, said in (
        (1, None, ""),
        (1, 9, "s0 < 9"),
        (9, None, "s0 >= 9"),
        (9, 20, "9 <= s0 < 20"),
    ):
        found = Range(low, high, {})
        assert found.named("s0") == said
        assert found.contains(low)
        assert not found.contains(low - 1)
        assert high is None or found.contains(high - 1) > found.contains(high)


# --- the break-even that people read


def holds(condition: str, size: int) -> bool:
    """Whether an inequality as it is printed holds."""
    if condition in ("always", "never"):
        return condition == "always"
    spans = condition.removeprefix("when ").split(" or ")
    assert all(re.fullmatch(r"(\d+ < N <= \d+|N <= \d+|N > \d+)", span) for span in spans), spans
    return any(eval(span, {"N": size}) for span in spans)


@every_layer
def test_the_forward_merges_from_in_times_out_over_in_plus_out_on(
    layer: tuple[int, int, int],
) -> None:
    i, o, r = layer
    problem = Varying.of(forward_only(lora_layer((96, i, o, r))), TOKENS, FLOPS)
    border = i * o / (i + o)
    said = break_even(problem, "N")
    for size in (*range(1, 3 * int(border)), 1 << 15):
        assert holds(said, size) == (size > border), (said, size)  # a tie stays as it came


@every_objective
@pytest.mark.parametrize("layer", [(256, 256, 8), (64, 128, 8)])
def test_break_even_choice_and_decision_agree_at_every_size(
    layer: tuple[int, int, int], objective: Objective
) -> None:
    known = Varying.of(forward_only(lora_layer((96, *layer))), TOKENS, objective)
    said = break_even(known, "N")
    plans = candidates(known)
    for size in range(1, 200):
        decision = decide(known.at(size), objective)
        takes = decision.plan if decision.changed else None
        mine = plans.plans[plans.choice(size)]
        assert known.priced(mine, size).price == pytest.approx(
            known.priced(takes, size).price, rel=1e-9
        )
        assert decision.changed == (mine is not None), size
        assert holds(said, size) == _merges(known.problem, mine, False), size


@every_objective
def test_a_change_never_says_that_it_saves_nothing(objective: Objective) -> None:
    for layer in LAYERS:
        known = varying(layer, objective)
        for size in DENSE[::7]:
            problem = known.at(size)
            decision = decide(problem, objective)
            if decision.changed and decision.plan is not None:
                first = saving(objective, problem, decision.plan).split(",")[0]
                assert "more" not in first
                assert not re.search(r"\b0\.0+%", first), first
                assert re.match(r"as ", first) is None, first


@every_objective
@every_layer
def test_the_break_even_says_when_the_cheapest_plan_merges(
    layer: tuple[int, int, int], objective: Objective
) -> None:
    i, o, r = layer
    problem = Varying.of(forward_only(lora_layer((96, i, o, r))), TOKENS, objective)
    said = break_even(problem, "N")
    came, *_ = candidates(problem).plans
    assert came is None
    for size in (*DENSE, 10_000, 50_000):
        sized = replace(problem.problem, dims=(size, *problem.problem.dims[1:]))
        plan = search(sized, problem.objective).plan
        # No product with X or X A' on the left, but one with W' + A' B' on the right.
        merges = len([op for op in plan.operations(sized) if hasattr(op, "k")]) == 2
        tie = abs(problem.priced(None, size).price / problem.priced(plan, size).price - 1) < 1e-9
        if not (tie and merges):
            assert holds(said, size) == merges, (said, size)


@every_layer
def test_forward_and_backward_are_told_apart_where_they_differ(
    layer: tuple[int, int, int],
) -> None:
    said = break_even(varying(layer, FLOPS), "s0*s1").replace("s0*s1", "N")
    apart = re.fullmatch(r"in the forward (.+), in the backward (.+)", said)
    for condition in apart.groups() if apart else [said]:
        # Few tokens never pay for merging a large weight; very many do.
        assert not holds(condition, 1)
        assert holds(condition, 1 << 17)


def test_the_steps_are_listed_once_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size has the ways, and their prices, of a problem that is listed for it alone."""
    problem = varying((64, 96, 8), Objective("flops"))
    alone = []
    for size in SEARCHED:
        _forget()
        alone.append(space_of(problem.at(size), problem.objective))
    _forget()
    together = [space_of(problem.at(SEARCHED[0]), problem.objective)]
    monkeypatch.setattr(Ways, "_steps", None)
    together += [space_of(problem.at(size), problem.objective) for size in SEARCHED[1:]]
    assert together == alone


def _forget() -> None:
    space_of.cache_clear()
    _listing.cache_clear()
