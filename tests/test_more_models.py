"""More architectures, through `runlora_eager`: found whole, equal to eager PEFT, never dearer.

Encoder-decoders with cross-attention, fused projections, grouped queries, windows, soft-capped
logits, relative positions: what the market leaves out, without the price of Inductor.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from checks import RUNLORA_EAGER, assert_same_values, compile_whole, matmul_flops
from market import lora_layers, randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import runlora_fx

WIDTH, FFN, HEADS, VOCAB, TOKENS = 32, 64, 4, 96, 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
}
# The causal loss is left out: transformers computes it in single precision.
TEXT = {"input_ids": torch.randint(5, VOCAB, (2, TOKENS), generator=torch.Generator())}
SEQ2SEQ = {**TEXT, "decoder_input_ids": TEXT["input_ids"].flip(1)}
ENCODER_DECODER = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": HEADS for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": FFN for side in ("encoder", "decoder")},
}


def _images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator(), dtype=torch.float64)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Tensor]]] = {
    "gemma2": (
        lambda: hf.Gemma2Model(hf.Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8)),
        TEXT,
    ),
    "phi3": (
        lambda: hf.Phi3Model(hf.Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0)),
        TEXT,
    ),
    "falcon": (
        lambda: hf.FalconModel(
            hf.FalconConfig(
                vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS
            )
        ),
        TEXT,
    ),
    "bloom": (
        lambda: hf.BloomModel(
            hf.BloomConfig(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
        ),
        TEXT,
    ),
    "t5": (
        lambda: hf.T5Model(
            hf.T5Config(
                vocab_size=VOCAB, d_model=WIDTH, d_kv=8, d_ff=FFN, num_layers=1, num_heads=HEADS
            )
        ),
        SEQ2SEQ,
    ),
    "whisper": (
        lambda: hf.WhisperModel(
            hf.WhisperConfig(
                **ENCODER_DECODER,
                max_source_positions=50,
                max_target_positions=TOKENS,
                num_mel_bins=16,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
        ),
        {"input_features": _images(2, 16, 100), "decoder_input_ids": TEXT["input_ids"]},
    ),
    "swin": (
        lambda: hf.SwinModel(
            hf.SwinConfig(
                image_size=32,
                patch_size=4,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 2],
                window_size=4,
            )
        ),
        {"pixel_values": _images(2, 3, 32, 32)},
    ),
}


def _values(
    run: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The hidden states and the gradient of every adapter."""
    model.zero_grad()
    hidden = run(**batch).last_hidden_state
    hidden.sin().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach(), **gradients}


@pytest.mark.parametrize("name", MODELS)
def test_found_whole_equal_and_never_dearer(name: str) -> None:
    build, batch = MODELS[name]
    torch.manual_seed(0)
    model = get_peft_model(build().double(), LoraConfig(r=4, target_modules="all-linear"))
    randomise_lora_b(model)
    model.eval()  # every family has dropouts of its own
    wanted = _values(model, model, batch)
    found = _values(compile_whole(model, RUNLORA_EAGER), model, batch)
    assert len(wanted) > 1
    assert_same_values(found, wanted, 1e-9)

    report = runlora_fx.last_report()
    assert report is not None
    named = {module for site in report.sites for module in site.modules}
    assert lora_layers(model).keys() <= named
    assert report.flops_after < report.flops_before
    assert not report.refusals


class Residual(nn.Module):
    """A residual block without a norm: sums are both multiplied and added to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


def test_a_residual_stream_without_norms_is_planned_layer_by_layer() -> None:
    """Its polynomial would grow with every block, and the search with it."""
    model = get_peft_model(
        nn.Sequential(*(Residual() for _ in range(3))),
        LoraConfig(r=8, lora_alpha=16, target_modules=["up", "down"]),
    )
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    graph = runlora_fx.joint_graph(model, (x,), objective="flops", strict=True).graph
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True] * 6
    assert report.flops_after < report.flops_before
    # The graph has a merged weight once, which the backward is going to make again.
    merging = 6 * 2 * 64 * 96 * 8
    assert matmul_flops(graph) == report.flops_after - merging


def test_a_model_called_several_times_in_a_graph_saves_no_smaller_share() -> None:
    torch.manual_seed(0)
    base = hf.LlamaModel(hf.LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    randomise_lora_b(model)
    tokens = TEXT["input_ids"]

    def shares(calls: int) -> float:
        def called(x: Tensor) -> Tensor:
            return torch.stack([model(x.roll(i)).last_hidden_state for i in range(calls)]).sum()

        report = runlora_fx.explain(called, tokens, objective="flops", strict=True)
        return report.flops_after / report.flops_before

    assert shares(4) <= shares(1) < 1
