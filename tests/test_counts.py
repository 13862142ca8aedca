"""What a rewritten training step costs, counted in Inductor's own graphs.

Every adapted layer is found, the matmuls that Inductor gets are those the planner priced, they are
fewer than without the rewriting, and no more bytes are saved for the backward.
"""

import pytest
from checks import INDUCTOR, RUNLORA, Training, compiled_training
from market import MODELS, lora_layers

import runlora_fx

pytestmark = [
    pytest.mark.parametrize("rank", (8, 64)),
    pytest.mark.parametrize("name", MODELS),
]


def _ours(name: str, rank: int) -> tuple[Training, "runlora_fx.Report"]:
    training = compiled_training(name, rank, RUNLORA)
    assert training.report is not None
    return training, training.report


def test_every_adapted_layer_is_named(name: str, rank: int) -> None:
    _, report = _ours(name, rank)
    named = {module for site in report.sites for module in site.modules}
    assert lora_layers(MODELS[name].model(rank)).keys() <= named


def test_inductor_gets_the_matmuls_that_were_priced(name: str, rank: int) -> None:
    training, report = _ours(name, rank)
    assert training.flops == report.flops_after


def test_fewer_matmul_flops_than_inductor(name: str, rank: int) -> None:
    """Every model of the market has enough tokens for the merged weight to pay."""
    training, report = _ours(name, rank)
    assert training.flops < compiled_training(name, rank, INDUCTOR).flops
    assert report.flops_after < report.flops_before
    assert any(site.changed for site in report.sites)


def test_no_more_bytes_saved_than_inductor(name: str, rank: int) -> None:
    training, _ = _ours(name, rank)
    assert training.saved <= compiled_training(name, rank, INDUCTOR).saved
