"""Quantised base weights: the dequantised weight is a leaf, and a temporary of each phase.

Libraries' own layers (bitsandbytes, torchtune) and hand-written ones (`examples/flavours`).
"""

import importlib
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from checks import (
    INDUCTOR,
    RUNLORA,
    assert_same_outputs_and_grads,
    compile_whole,
    relative_error,
    saved_bytes,
    scalar_kernels,
)
from market import randomise_lora_b
from peft import LoraConfig, get_peft_model
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointPolicy
from trainings import Products, without_kernels

import runlora_fx
from runlora_fx.cost_model.devices.machine import Machine
from runlora_fx.options import Options
from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.cuts import Cut
from runlora_fx.passes.pipeline import rewrite_graph
from runlora_fx.passes.read.analysis import Analysis
from runlora_fx.passes.tune.region_graph import region_graph

sys.path.append(str(Path(__file__).parent.parent / "examples" / "flavours"))

from quantised import GptqLinear, HqqLinear, gptq_lora, hqq_lora

IN, OUT, RANK = 64, 128, 8
# Merging pays from 43 tokens on: in * out / (in + out) is 42.7; in both phases from 86 on.
MANY, FEW = 192, 8
RTOL = 1e-5
NF4_MODULE = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor"


def by_bitsandbytes(*, bias: bool = True, nested: bool = False) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    settings = {"quant_type": "nf4", "compress_statistics": nested}
    layer = bitsandbytes.nn.Linear4bit(IN, OUT, bias=bias, compute_dtype=torch.float32, **settings)
    weight = torch.randn(OUT, IN) / IN**0.5
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **settings)
    model = nn.Sequential(layer.to("cpu"))
    model.is_loaded_in_4bit = True
    adapted = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, target_modules=["0"]))
    randomise_lora_b(adapted)
    return adapted.train()


def by_torchtune() -> nn.Module:
    # torchtune 0.6 imports NF4 from where torchao had it before 0.18.
    pytest.importorskip("torchao")
    sys.modules.setdefault("torchao.dtypes.nf4tensor", importlib.import_module(NF4_MODULE))
    torchtune = pytest.importorskip("torchtune.modules.peft")
    layer = torchtune.LoRALinear(
        IN, OUT, rank=RANK, alpha=16.0, quantize_base=True, scaler_block_size=64
    )
    torchtune.set_trainable_params(layer, torchtune.get_adapter_params(layer))
    nn.init.normal_(layer.lora_b.weight, std=0.02)
    return nn.Sequential(layer).train()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "bitsandbytes": by_bitsandbytes,
    "bitsandbytes, no bias": lambda: by_bitsandbytes(bias=False),
    "bitsandbytes, quantised scales": lambda: by_bitsandbytes(nested=True),
    "torchtune": by_torchtune,
    "HQQ": lambda: nn.Sequential(hqq_lora(nn.Linear(IN, OUT), RANK)),
    "GPTQ": lambda: nn.Sequential(gptq_lora(nn.Linear(IN, OUT), RANK)),
}

every_layer = pytest.mark.parametrize("name", LAYERS)


def layer(name: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[name]()


def activation(tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, tokens // 2, IN, generator=generator).requires_grad_(True)


def weight_sized(graph: fx.Graph) -> list[fx.Node]:
    """Sums with a product that have the shape of the weight, whichever way round."""
    return [
        node
        for node in graph.nodes
        if node.target is torch.ops.aten.addmm.default
        and sorted(node.meta["val"].shape) == sorted((IN, OUT))
    ]


def saved_shapes(forward: Callable[[], object]) -> list[list[int]]:
    """Shapes of the tensors that a forward keeps, without regard to orientation."""
    shapes: list[list[int]] = []

    def keep(x: Tensor) -> Tensor:
        shapes.append(sorted(x.shape))
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        forward()
    return shapes


@every_layer
def test_the_adapter_is_added_to_the_dequantised_weight_by_one_product(name: str) -> None:
    joint = runlora_fx.joint_graph(layer(name), (activation(MANY),), strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    (site,) = report.sites
    assert site.changed
    (merged,) = weight_sized(joint.graph)
    dequantised = merged.args[0]
    assert isinstance(dequantised, fx.Node)
    assert dequantised.op == "call_function"  # made in the graph, not given
    # One for the forward and one for the backward.
    assert merged.meta["recompute"] == CheckpointPolicy.MUST_RECOMPUTE
    assert list(dequantised.users) == [merged]  # the weight alone multiplies nothing


@every_layer
@scalar_kernels
def test_a_step_keeps_less_and_no_dequantised_weight(name: str) -> None:
    """Inductor keeps the weight where plain operations dequantise it; merged, it is made again."""
    model, x = layer(name), activation(MANY)
    kept: dict[str, int] = {}
    for backend in (INDUCTOR, RUNLORA):
        compiled = compile_whole(model, backend)
        assert_same_outputs_and_grads(model, compiled, [x], RTOL)
        given = [x, *model.parameters(), *model.buffers()]
        kept[backend] = saved_bytes(partial(compiled, x), given)
    assert kept[RUNLORA] < kept[INDUCTOR]
    assert sorted((IN, OUT)) not in saved_shapes(partial(compiled, x))


@pytest.mark.parametrize("make", (HqqLinear, GptqLinear))
def test_dequantisation_is_what_was_quantised(make: type[HqqLinear | GptqLinear]) -> None:
    """Four bits: within half a step of the original, where a step is a fifteenth of the range."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    layer = make(linear)
    found = layer.dequantise()
    found = found if found.shape == linear.weight.shape else found.t()
    step = 2 * IN**-0.5 / 15
    assert (found - linear.weight).abs().max() <= 1.01 * step
    x = activation(FEW)
    assert relative_error(layer(x), linear(x)) < 0.1


# --- products that a library hides


def gemms(graph: fx.Graph) -> int:
    return sum(str(node.target) == "bitsandbytes.gemm_4bit.default" for node in graph.nodes)


def test_with_few_tokens_the_fused_product_stays() -> None:
    """The weight is made only where that gains something."""
    model = layer("bitsandbytes")
    x = activation(FEW)
    joint = runlora_fx.joint_graph(model, (x,), strict=True)
    assert gemms(joint.graph) == 1
    assert not weight_sized(joint.graph)
    assert_same_outputs_and_grads(model, compile_whole(model, "runlora_eager"), [x], RTOL)


def test_with_many_tokens_the_weight_is_made_and_merged() -> None:
    joint = runlora_fx.joint_graph(layer("bitsandbytes"), (activation(MANY),), strict=True)
    assert gemms(joint.graph) == 0


class Branches(nn.Module):
    """A changed layer, whose output is needed anyway, and a 4-bit layer that reads it."""

    def __init__(self) -> None:
        super().__init__()
        bitsandbytes = pytest.importorskip("bitsandbytes")
        self.changed = hqq_lora(nn.Linear(IN, OUT), RANK)
        stays = bitsandbytes.nn.Linear4bit(OUT, IN, compute_dtype=torch.float32, quant_type="nf4")
        self.stays = stays.to("cpu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.changed(x)
        return nn.functional.gelu(y), self.stays(y)


def test_a_fused_product_that_stays_may_read_what_changes() -> None:
    torch.manual_seed(0)
    model, x = Branches(), activation(MANY)
    joint = runlora_fx.joint_graph(model, (x,), strict=True)
    assert gemms(joint.graph) == 1
    assert len(weight_sized(joint.graph)) == 1
    assert_same_outputs_and_grads(model, compile_whole(model, "runlora_eager"), [x], RTOL)


def test_a_fused_product_without_an_adapter_stays() -> None:
    model = layer("bitsandbytes").get_base_model()[0].base_layer
    joint = runlora_fx.joint_graph(model, (activation(MANY),), strict=True)
    assert gemms(joint.graph) == 1


def fused_graph(
    tokens: int, *, nested: bool, product: str
) -> tuple[fx.GraphModule, list[Tensor], Tensor]:
    """``x W' + bias + x a b`` with a 4-bit W, where ``a b`` is multiplied first or last."""
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(0)
    sizes = ((tokens, IN), (OUT,), (IN, RANK), (RANK, OUT))
    inputs = [torch.randn(size, generator=generator) / 4 for size in sizes]
    weight = torch.randn(OUT, IN, generator=generator) / 8
    packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    inputs += [packed, state.absmax]
    if nested:
        inputs[-1:] = [state.state2.absmax, state.absmax, state.state2.code, state.offset]

    def fn(
        x: Tensor, bias: Tensor, a: Tensor, b: Tensor, packed: Tensor, *scales: Tensor
    ) -> Tensor:
        mm, block = torch.ops.aten.mm.default, state.blocksize
        base = torch.ops.bitsandbytes.gemm_4bit.default(
            x, packed, [OUT, IN], scales[0], block, "nf4", bias, *scales[1:]
        )
        low_rank = mm(mm(x, a), b) if product == "left first" else mm(x, mm(a, b))
        return torch.ops.aten.add.Tensor(base, low_rank)

    return make_fx(fn, tracing_mode="fake")(*inputs), inputs, fn(*inputs)


def rewritten(gm: fx.GraphModule) -> Counter[str]:
    """How often a rewritten graph calls each operator."""
    options = Options(objective="flops", strict=True)
    rewrite_graph(gm.graph, ATEN, options, Machine(use_stored=False))
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return Counter(str(node.target) for node in gm.graph.nodes)


DEQUANTISE, GEMM = "bitsandbytes.dequantize_4bit.default", "bitsandbytes.gemm_4bit.default"


@pytest.mark.parametrize("nested", (False, True))
def test_a_fused_product_stays_where_only_other_products_change(nested: bool) -> None:
    gm, inputs, wanted = fused_graph(FEW, nested=nested, product="right first")
    calls = rewritten(gm)
    assert (calls[GEMM], calls[DEQUANTISE]) == (1, 0)
    assert calls["aten.mm.default"] + calls["aten.addmm.default"] == 2
    assert relative_error(gm(*inputs), wanted) < RTOL


@pytest.mark.parametrize("nested", (False, True))
def test_a_graph_with_a_fused_product_that_gains_nothing_is_not_touched(nested: bool) -> None:
    gm, _, _ = fused_graph(FEW, nested=nested, product="left first")
    before = gm.code
    rewritten(gm)
    assert gm.code == before


@pytest.mark.parametrize("nested", (False, True))
def test_a_merged_weight_is_made_of_the_dequantised_one(nested: bool) -> None:
    gm, inputs, wanted = fused_graph(MANY, nested=nested, product="left first")
    calls = rewritten(gm)
    assert (calls[GEMM], calls[DEQUANTISE]) == (0, 1)
    assert relative_error(gm(*inputs), wanted) < RTOL


def test_a_weight_dequantised_in_both_phases_is_one_leaf() -> None:
    """The forward multiplies by it without making it, the backward makes it."""
    seen: list[set[int]] = []

    def look(gm: fx.GraphModule) -> None:
        reader = Analysis(gm.graph, ATEN).reader
        (gemm,) = (n for n in gm.graph.nodes if str(n.target) == GEMM)
        (made,) = (n for n in gm.graph.nodes if str(n.target) == DEQUANTISE)
        (product,) = reader.forms[gemm].products
        seen.append({leaf for p in product.operands(reader)[1] for leaf in p.leaves})
        seen.append({leaf for p in reader.operand(made, Cut(0, 1)) for leaf in p.leaves})

    x = activation(FEW)
    look(runlora_fx.joint_graph(layer("bitsandbytes, quantised scales"), (x,), strict=True))
    assert seen[0] == seen[1]


def test_a_trial_of_a_region_reads_the_same_problem() -> None:
    """What computes a virtual leaf is taken along, so that both phases read one leaf there too."""

    def look(gm: fx.GraphModule) -> None:
        whole = Analysis(gm.graph, ATEN)
        tried = region_graph(gm.graph, whole.reader, whole.phases, whole.regions.regions[0])
        alone = Analysis(tried.module.graph, ATEN)
        assert [posed.problem for posed in alone.posed] == [whole.posed[0].problem]

    x = activation(FEW)
    look(runlora_fx.joint_graph(layer("bitsandbytes, quantised scales"), (x,), strict=True))


# --- mixed batches


def test_mixed_batches_run_as_under_inductor() -> None:
    """PEFT's `adapter_names`: rows of the batch see different adapters, or none."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(IN, OUT), nn.GELU(), nn.Linear(OUT, IN))
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules=["0", "2"])
    model = get_peft_model(layers, config).eval()
    model.add_adapter("second", config)
    randomise_lora_b(model)
    x = torch.randn(4, MANY, IN, generator=torch.Generator().manual_seed(0))
    batches = (
        ["default", "second", "__base__", "second"],
        ["second", "second", "default", "__base__"],
    )
    products: dict[str, Products] = {}
    graphs: dict[str, int] = {}
    for backend in (INDUCTOR, RUNLORA):
        torch._dynamo.reset()
        counters.clear()
        products[backend] = Products()
        with without_kernels(products[backend]), torch.no_grad():
            # Not in one graph: PEFT registers hooks that carry the names, which breaks it.
            compiled = torch.compile(model, backend=backend)
            for names in batches:
                found, wanted = compiled(x, adapter_names=names), model(x, adapter_names=names)
                assert relative_error(found, wanted) < RTOL
        graphs[backend] = counters["stats"]["unique_graphs"]
    assert graphs[RUNLORA] == graphs[INDUCTOR]
    assert 0 < products[RUNLORA].flops <= products[INDUCTOR].flops
