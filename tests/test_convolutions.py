"""Adapters of convolutions: kernels are merged, forward and backward, for every geometry."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import RUNLORA_EAGER, assert_same_values, ours, run_training
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import runlora_fx
from runlora_fx.passes.levels.geometry import Geometry

ROOT = Path(__file__).parent.parent
RANK = 2
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class LoraConvolution(nn.Module):
    """PEFT's: a base convolution, one of the same geometry to the rank, and one to the outputs."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, **moves: Any) -> None:
        super().__init__()
        planes = moves.pop("planes", 2)
        make = CONVOLUTIONS[planes]
        bias = moves.pop("bias", True)
        self.base = make(inputs, outputs, kernel, bias=bias, **moves).requires_grad_(False)
        self.a = make(inputs, RANK, kernel, bias=False, **moves)
        self.b = make(RANK, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.b(self.a(x))


@dataclass(frozen=True)
class Case:
    """A geometry.

    Attributes:
        kernel: The size of the kernel.
        images: The shape of the images.
        moves: How the kernel moves over them.
    """

    kernel: Any
    images: tuple[int, ...] = (2, 6, 18, 21)
    moves: dict[str, Any] = field(default_factory=dict)


CASES = {
    "3 x 3": Case(3, moves={"padding": 1}),
    "one image": Case(3, (1, 6, 18, 21), {"padding": 1}),
    "pointwise": Case(1),
    "pointwise, strided": Case(1, moves={"stride": 2}),
    "strided, columns left over": Case(3, moves={"stride": (2, 3), "padding": (1, 0)}),
    "dilated": Case((3, 2), moves={"dilation": (2, 1), "padding": (2, 0)}),
    "patches of a transformer": Case(3, moves={"stride": 3}),
    "whole images": Case((18, 21), (64, 6, 18, 21)),
    "without bias": Case(3, moves={"bias": False}),
    "lines": Case(5, (3, 6, 120), {"planes": 1, "padding": 2}),
    "volumes": Case(2, (2, 6, 7, 6, 8), {"planes": 3}),
}


class Net(nn.Module):
    """A convolution whose input needs a gradient, and whose output is not the result."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(x)))


def compiled(model: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    given = ours(objective="flops", strict=True)
    dynamic = options.pop("dynamic", False)
    return torch.compile(model, backend=RUNLORA_EAGER, options=given, dynamic=dynamic)


def images(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(run: Callable[..., Any], model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The result, and the gradients of the images and of all parameters."""
    model.zero_grad(set_to_none=True)
    given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = run(given)
    (y * torch.linspace(-1.0, 2.0, y.numel()).to(y).view(y.shape)).sum().backward()
    sources = {"images": given, **dict(model.named_parameters())}
    grads = {f"gradient of {n}": s.grad for n, s in sources.items() if s.grad is not None}
    return {"result": y.detach(), **grads}


def compared(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Train and infer as in eager mode; the FLOPs of a training step as it came and as planned."""
    with FlopCounterMode(display=False) as counter:
        wanted = trained(model, model, x)
    run = compiled(model)
    found = trained(run, model, x)
    report = runlora_fx.last_report()
    assert report is not None
    with torch.no_grad():
        wanted["inferred"], found["inferred"] = model(x), run(x)
    assert_same_values(found, wanted, 1e-12)
    if report.sites:
        assert report.flops_before == counter.get_total_flops()
    return report.flops_before, report.flops_after


#: The cases that add least to the others.
MORE = ("pointwise, strided", "patches of a transformer", "whole images", "lines", "volumes")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MORE]


@pytest.mark.parametrize("name", [*(name for name in CASES if name not in MORE), *SLOW])
def test_kernels_are_merged(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    layer = LoraConvolution(case.images[1], 10, case.kernel, **case.moves)
    before, after = compared(Net(layer).double(), images(*case.images))
    assert after < before
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True]


def test_images_in_channels_last_keep_their_strides() -> None:
    model = Net(LoraConvolution(6, 10, 3, padding=1)).double().to(memory_format=torch.channels_last)
    x = images(2, 6, 18, 21).to(memory_format=torch.channels_last)
    run = compiled(model)
    found = trained(run, model, x)
    assert_same_values(found, trained(model, model, x), 1e-12)
    assert found["result"].is_contiguous(memory_format=torch.channels_last)
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True]


def test_gradients_of_an_image_that_two_geometries_read_are_added() -> None:
    """Both folds have matrices of one size, and are folds of different matrices."""

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near = LoraConvolution(6, 8, 3, padding=1)
            self.far = LoraConvolution(6, 8, 3, padding=2, dilation=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.near(x) + self.far(x) + x.mean(1, keepdim=True)

    before, after = compared(Net(Pyramid()).double(), images(2, 6, 18, 21))
    assert after < before


def test_a_residual_stream_is_added_to_a_fold() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LoraConvolution(6, 6, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = x + torch.tanh(self.layer(x))
            return x + self.layer(x)

    before, after = compared(Net(Residual()).double(), images(2, 6, 18, 21))
    assert after < before


def test_everything_is_trained() -> None:
    """The gradient of the weight exists, so those of the adapters follow from it."""
    model = Net(LoraConvolution(6, 10, 3, padding=1)).double().requires_grad_(True)
    before, after = compared(model, images(2, 6, 18, 21))
    assert after < before


def test_groups_and_few_positions_are_left_alone() -> None:
    groups = Net(LoraConvolution(6, 10, 3, groups=2)).double()
    before, after = compared(groups, images(2, 6, 18, 21))
    assert after == before
    few = Net(LoraConvolution(6, 10, 3)).double()
    before, after = compared(few, images(2, 6, 3, 3))
    assert after == before
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [False]


def test_images_of_any_size_are_read_if_the_kernel_moves_by_one() -> None:
    layers = nn.Sequential(LoraConvolution(6, 10, 3), LoraConvolution(10, 8, 3, stride=2))
    model = Net(layers).double()
    run = compiled(model, dynamic=True)
    torch._dynamo.utils.counters.clear()
    for shape in ((2, 6, 18, 21), (3, 6, 30, 25)):
        x = images(*shape)
        assert_same_values(trained(run, model, x), trained(model, model, x), 1e-12)
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_adapters_in_a_wider_dtype_read_the_patches_of_their_layer() -> None:
    """Under relaxed numerics the images and their cast are one leaf, and so are their patches."""

    class Wider(LoraConvolution):
        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + 0.5 * self.b(self.a(x.float())).bfloat16()

    layer = Wider(6, 10, 3, padding=1)
    layer.base.bfloat16()
    model, x = Net(layer), images(2, 6, 18, 21).bfloat16()
    torch._dynamo.reset()
    options = ours(objective="flops", numerics="relaxed")
    run = torch.compile(model, backend=RUNLORA_EAGER, options=options)
    assert_same_values(trained(run, model, x), trained(model, model, x), 2e-2)
    report = runlora_fx.last_report()
    assert report is not None
    assert [site.changed for site in report.sites] == [True]


def test_merged_kernels_are_not_kept_between_calls() -> None:
    """A plan shows kernels through views, and a view need not have the versions of its weight."""
    layer, x = LoraConvolution(6, 10, 3, padding=1).double(), images(2, 6, 18, 21)
    budget = {"memory": "fast", "memory_budget": 1 << 20, "reuse": True}
    runlora_fx.forget_merged_weights()
    torch._dynamo.reset()
    run = torch.compile(layer, backend=RUNLORA_EAGER, options=ours(objective="flops", **budget))
    with torch.no_grad():
        run(x)
        layer.b.weight += 0.5
        assert_same_values({"y": run(x)}, {"y": layer(x)}, 1e-12)
    assert runlora_fx.forget_merged_weights() == 0


def test_a_geometry_gives_the_sizes_of_results_and_images() -> None:
    geometry = Geometry((3, 2), (2, 1), (1, 0), (1, 2), (0, 0))
    x, y = torch.empty(1, 1, 7, 9), torch.empty(1, 1, 3, 2)
    made = torch.conv2d(x, y[:, :, :3, :2], stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    assert geometry.results((7, 9)) == tuple(made.shape[2:])
    assert geometry.images(geometry.results((7, 9))) == (7, 9)
    assert geometry.taps == 6
    assert not geometry.is_pointwise


def test_the_published_counts_are_those_of_this_code() -> None:
    """`benchmarks/gathered_costs.py` wrote two tables of docs/flavours.md."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from gathered_costs import LAYERS, convolution, table
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    text = (ROOT / "docs" / "flavours.md").read_text(encoding="utf-8")
    assert f"\n{table('embeddings')}\n" in text
    assert all(f"\n| {case.name} | " in text for case in LAYERS)
    assert f"\n| {' | '.join(convolution(LAYERS[-1]))} |\n" in text


def test_a_head_that_is_tied_to_the_embedding_gains_as_a_linear_layer() -> None:
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=160,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=False)
    model = get_peft_model(LlamaForCausalLM(config), lora).double()
    randomise_lora_b(model)
    ids = torch.randint(160, (2, 48), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids}
    wanted = run_training(model, batch)
    torch._dynamo.reset()
    run = torch.compile(model, backend=RUNLORA_EAGER, options=ours(objective="flops"))
    assert_same_values(run_training(run, batch), wanted, 1e-12)
    report = runlora_fx.last_report()
    assert report is not None
    assert [(site.changed, site.modules) for site in report.sites] == [
        (True, ("base_model.model.lm_head",))
    ]
