"""Whole PEFT models: loss, logits and every adapter gradient as before the rewriting, for less.

Reassociation changes rounding only. In fp64 that leaves no room to hide in; in fp32 the results
must agree as two orderings of the same sums do; in bf16 the rewritten step may not be noticeably
further from the fp64 result than what Inductor makes of the unchanged one.

What a step costs is counted in Inductor's own graphs: every adapted layer is found, the matmuls
that Inductor gets are those the planner priced, they are fewer than without the rewriting, and no
more bytes are saved for the backward.
"""

import math
from dataclasses import dataclass

import pytest
import torch
from checks import (
    INDUCTOR,
    RUNLORA,
    RUNLORA_EAGER,
    Training,
    assert_same_values,
    compile_whole,
    compiled_training,
    run_inference,
    run_training,
    scalar_kernels,
)
from market import MODELS, lora_layers

import runlora_fx

RTOL = {torch.float32: 1e-5, torch.float64: 1e-11}

# All models at one rank, one at the other.
CASES = [*((name, 64) for name in MODELS), ("llama", 8)]
every_case = pytest.mark.parametrize(("name", "rank"), CASES)
# The same for what Inductor compiles, once for this file.
every_compiled_case = pytest.mark.parametrize(
    ("name", "rank"),
    [pytest.param(*case, marks=() if case == ("llama", 8) else pytest.mark.slow) for case in CASES],
)
every_dtype = pytest.mark.parametrize("dtype", RTOL, ids=str)


@every_compiled_case
def test_a_training_step_equals_eager(name: str, rank: int) -> None:
    case = MODELS[name]
    wanted = run_training(case.model(rank), case.batch())
    assert_same_values(compiled_training(name, rank, RUNLORA).values, wanted, RTOL[torch.float32])


@every_case
def test_a_training_step_in_fp64_equals_eager(name: str, rank: int) -> None:
    case, dtype = MODELS[name], torch.float64
    model, batch = case.model(rank, dtype), case.batch(dtype)
    wanted = run_training(model, batch)
    compiled = compile_whole(model, RUNLORA_EAGER)
    assert_same_values(run_training(compiled, batch), wanted, RTOL[dtype])


@every_dtype
@every_case
def test_inference_without_code_generation_equals_eager(
    name: str, rank: int, dtype: torch.dtype
) -> None:
    _check_inference(name, rank, dtype, RUNLORA_EAGER)


@pytest.mark.parametrize(
    ("name", "rank"), [("llama", 8), pytest.param("gpt2", 64, marks=pytest.mark.slow)]
)
def test_inference_equals_eager(name: str, rank: int) -> None:
    _check_inference(name, rank, torch.float32, RUNLORA)


@scalar_kernels
def _check_inference(name: str, rank: int, dtype: torch.dtype, backend: str) -> None:
    case = MODELS[name]
    model, batch = case.model(rank, dtype).eval(), case.batch(dtype)
    wanted = run_inference(model, batch)
    compiled = compile_whole(model, backend)
    assert_same_values(run_inference(compiled, batch), wanted, RTOL[dtype])


@dataclass(frozen=True)
class Error:
    """Relative distance from the fp64 result, over several seeds."""

    outputs: float
    gradients: float


@pytest.mark.parametrize(
    ("name", "rank", "adapter_dtype"),
    [
        ("llama", 8, torch.bfloat16),
        pytest.param("llama", 64, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("gpt2", 64, torch.bfloat16, marks=pytest.mark.slow),
        # PEFT's default: adapters stay in fp32
        pytest.param("gpt2", 64, torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bf16_is_as_near_to_fp64_as_inductor(
    name: str, rank: int, adapter_dtype: torch.dtype
) -> None:
    ours, inductor = (_bf16_error(name, adapter_dtype, rank, b) for b in (RUNLORA, INDUCTOR))
    assert ours.outputs <= 1.25 * inductor.outputs
    assert ours.gradients <= 1.25 * inductor.gradients


@scalar_kernels
def _bf16_error(name: str, adapter_dtype: torch.dtype, rank: int, backend: str) -> Error:
    case, dtype = MODELS[name], torch.bfloat16
    model = case.model(rank, dtype, adapter_dtype=adapter_dtype)
    compiled = compile_whole(model, backend)
    reference = case.model(rank, torch.float64)

    squares = {"outputs": 0.0, "gradients": 0.0}
    seeds = range(3)
    for seed in seeds:
        batch = case.batch(seed=seed)
        weights = case.model(rank, dtype, adapter_dtype=adapter_dtype, seed=seed).state_dict()
        model.load_state_dict(weights)
        reference.load_state_dict(weights)
        found, wanted = run_training(compiled, batch), run_training(reference, batch)
        for group in squares:
            names = [n for n in wanted if (n in ("loss", "logits")) == (group == "outputs")]
            error = math.fsum((found[n].double() - wanted[n]).square().sum().item() for n in names)
            scale = math.fsum(wanted[n].square().sum().item() for n in names)
            squares[group] += error / scale
    return Error(**{group: math.sqrt(square / len(seeds)) for group, square in squares.items()})


# --- what a step costs


def _ours(name: str, rank: int) -> tuple[Training, "runlora_fx.Report"]:
    training = compiled_training(name, rank, RUNLORA)
    assert training.report is not None
    return training, training.report


@every_compiled_case
def test_every_adapted_layer_is_named(name: str, rank: int) -> None:
    _, report = _ours(name, rank)
    named = {module for site in report.sites for module in site.modules}
    assert lora_layers(MODELS[name].model(rank)).keys() <= named


@every_compiled_case
def test_inductor_gets_the_matmuls_that_were_priced(name: str, rank: int) -> None:
    training, report = _ours(name, rank)
    assert training.flops == report.flops_after


@every_compiled_case
def test_fewer_matmul_flops_than_inductor(name: str, rank: int) -> None:
    """Every model of the market has enough tokens for the merged weight to pay."""
    training, report = _ours(name, rank)
    assert training.flops < compiled_training(name, rank, INDUCTOR).flops
    assert report.flops_after < report.flops_before
    assert any(site.changed for site in report.sites)


@every_compiled_case
def test_no_more_bytes_saved_than_inductor(name: str, rank: int) -> None:
    training, _ = _ours(name, rank)
    assert training.saved <= compiled_training(name, rank, INDUCTOR).saved
