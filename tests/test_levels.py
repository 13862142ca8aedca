"""`rewrite` at every graph level: one layer, one plan, whichever tracer made the graph.

Also what holds for any rewritten graph (nodes carry metadata, nothing of the original is touched,
rewriting again changes nothing), and the two functions that look at whole models.
"""

import copy
import pickle  # noqa: TID251 - of our own graphs, from memory
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from checks import assert_same_outputs_and_grads, assert_same_values, outputs_and_grads
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import runlora_fx
from runlora_fx._torch_compat import APART

IN, OUT, RANK, SCALING = 32, 48, 4, 2
# Merging pays from 20 tokens on: in * out / (in + out) is 19.2.
MANY, FEW = 20, 19
RTOL = 1e-12

MERGED, TWO_PATHS = "Y = X (W' + 2 A' B')", "Y = X W' + 2 (X A') B'"
MERGED_FLOPS = 2 * (MANY * IN * OUT + IN * OUT * RANK)

Inputs: TypeAlias = list[Any]
Tracer: TypeAlias = Callable[[nn.Module, Tensor], tuple[fx.GraphModule, Inputs]]


def two_path_flops(tokens: int) -> int:
    return 2 * tokens * (IN * OUT + IN * RANK + RANK * OUT)


class LoraLinear(nn.Module):
    """A LoRA layer that no library made."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(IN, OUT)
        self.down = nn.Linear(IN, RANK, bias=False)
        self.up = nn.Linear(RANK, OUT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALING * self.up(self.down(x))


def by_hand() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(LoraLinear()).double()


def by_peft() -> nn.Module:
    torch.manual_seed(0)
    # Without init_lora_weights=False B is zero, and so is the gradient of A.
    config = LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], init_lora_weights=False
    )
    model: nn.Module = get_peft_model(nn.Sequential(nn.Linear(IN, OUT)), config).get_base_model()
    for weight in model.parameters():
        weight.requires_grad_(True)
    return model.double()


def activation(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, IN, generator=generator, dtype=torch.float64)


# --- levels


def symbolic(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Inputs]:
    # PEFT branches on the dtype of its input, unless told not to; a symbolic trace cannot branch.
    with disable_input_dtype_casting(model):
        return fx.symbolic_trace(model), [x]


def dynamo(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Inputs]:
    seen: list[tuple[fx.GraphModule, Inputs]] = []

    def capture(gm: fx.GraphModule, inputs: Inputs) -> Callable[..., Any]:
        # Shallow: the compiled function frees its graph's inputs, but the graph stays.
        seen.append((gm, list(inputs)))
        return gm.forward

    torch.compile(model, backend=capture, fullgraph=True)(x)
    (graph,) = seen
    return graph


def exported(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Inputs]:
    gm = torch.export.export(model, (x,)).module()
    assert isinstance(gm, fx.GraphModule)
    return gm, [x]


def aten(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, Inputs]:
    return make_fx(model)(x), [x]


LEVELS: dict[str, Tracer] = {
    "symbolic_trace": symbolic,
    "dynamo": dynamo,
    "export": exported,
    "make_fx": aten,
}


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    """Dynamo makes a size symbolic that it has seen change."""
    torch._dynamo.reset()


every_level = pytest.mark.parametrize("level", LEVELS)
torch_level = pytest.mark.parametrize("level", ("symbolic_trace", "dynamo"))
every_rank = pytest.mark.parametrize("batch", ((), (1,)), ids=("2-d", "3-d"))


def rewrite(gm: fx.GraphModule, inputs: Inputs | None) -> tuple[fx.GraphModule, runlora_fx.Report]:
    rewritten = runlora_fx.rewrite(gm, inputs, strict=True)
    report = runlora_fx.last_report()
    assert report is not None
    return rewritten, report


# --- one plan


@pytest.mark.parametrize(
    ("layer", "level"),
    # PEFT's layer as a symbolic trace has a test of its own.
    [
        (layer, level)
        for layer in (by_hand, by_peft)
        for level in LEVELS
        if (layer, level) != (by_peft, "symbolic_trace")
    ],
)
@every_rank
@pytest.mark.parametrize("tokens", (MANY, FEW), ids=("many tokens", "few tokens"))
def test_same_plan_and_values_at_every_level(
    layer: Callable[[], nn.Module], tokens: int, batch: tuple[int, ...], level: str
) -> None:
    model, x = layer(), activation(*batch, tokens)
    gm, inputs = LEVELS[level](model, x)
    rewritten, report = rewrite(gm, inputs)

    merges = tokens == MANY
    (site,) = report.sites
    assert site.before == TWO_PATHS
    assert site.after == (MERGED if merges else TWO_PATHS)
    assert site.changed == merges
    flops = (two_path_flops(tokens), MERGED_FLOPS if merges else two_path_flops(tokens))
    assert (site.flops_before, site.flops_after) == flops
    assert (report.flops_before, report.flops_after) == flops

    assert_same_outputs_and_grads(gm, rewritten, inputs, RTOL)
    (found,) = tree_leaves(rewritten(*inputs))
    assert_same_values({"output": found}, {"output": model(x)}, RTOL)


def test_same_plan_of_a_symbolic_trace_of_peft() -> None:
    gm, inputs = symbolic(by_peft(), activation(MANY))
    _, report = rewrite(gm, inputs)
    assert [site.after for site in report.sites] == [MERGED]


# --- shapes


@torch_level
@every_rank
def test_torch_level_graphs_hold_for_other_batch_sizes(batch: tuple[int, ...], level: str) -> None:
    model = by_hand()
    gm, inputs = LEVELS[level](model, activation(*batch, MANY))
    rewritten, _ = rewrite(gm, inputs)
    for other in (1, 7, 3 * MANY):
        x = activation(*(2 * n for n in batch), other)
        given = [i if isinstance(i, nn.Parameter) else x for i in inputs]
        assert_same_outputs_and_grads(gm, rewritten, given, RTOL)


def exported_for_any_batch(model: nn.Module, x: Tensor) -> fx.GraphModule:
    batch = torch.export.Dim("batch", min=2, max=1024)
    gm = torch.export.export(model, (x,), dynamic_shapes={"input": {0: batch}}).module()
    assert isinstance(gm, fx.GraphModule)
    return gm


@pytest.mark.parametrize("give_inputs", (False, True))
def test_an_export_for_any_batch_size_stays_one(give_inputs: bool) -> None:
    model, x = by_hand(), activation(4, MANY)
    gm = exported_for_any_batch(model, x)
    rewritten, report = rewrite(gm, [x] if give_inputs else None)
    assert [site.after for site in report.sites] == [MERGED]
    assert_same_outputs_and_grads(gm, rewritten, [activation(9, MANY)], RTOL)


def test_without_shapes_the_error_says_what_is_missing() -> None:
    gm, _ = symbolic(by_hand(), activation(MANY))
    with pytest.raises(ValueError, match=r"give example_inputs.*missing on input"):
        runlora_fx.rewrite(gm)


@pytest.mark.parametrize("count", (0, 2))
def test_a_wrong_number_of_example_inputs_is_an_error(count: int) -> None:
    gm, _ = symbolic(by_hand(), activation(MANY))
    with pytest.raises(ValueError, match=f"the graph has 1 inputs, got {count} example inputs"):
        runlora_fx.rewrite(gm, [activation(MANY)] * count)


@pytest.mark.parametrize("level", ("dynamo", "export", "make_fx"))
def test_metadata_replaces_example_inputs(level: str) -> None:
    gm, _ = LEVELS[level](by_hand(), activation(MANY))
    _, report = rewrite(gm, None)
    assert [site.after for site in report.sites] == [MERGED]


# --- the rewritten graph, and the original


@every_level
def test_the_original_is_untouched_and_its_parameters_are_shared(level: str) -> None:
    gm, inputs = LEVELS[level](by_hand(), activation(MANY))

    def state() -> list[object]:
        nodes = [(node, node.op, node.target, node.args, set(node.meta)) for node in gm.graph.nodes]
        members = (dict(m()) for m in (gm.named_parameters, gm.named_buffers, gm.named_modules))
        return [gm.code, nodes, *([(name, id(x)) for name, x in m.items()] for m in members)]

    before = state()
    rewritten, report = rewrite(gm, inputs)
    assert state() == before
    assert rewritten is not gm
    assert rewritten.code != gm.code
    assert [site.changed for site in report.sites] == [True]

    own = dict(gm.named_parameters())
    shared = dict(rewritten.named_parameters())
    assert shared.keys() == own.keys()
    assert all(shared[name] is own[name] for name in shared)


@every_level
@every_rank
def test_rewriting_again_changes_nothing(batch: tuple[int, ...], level: str) -> None:
    gm, inputs = LEVELS[level](by_hand(), activation(*batch, MANY))
    once, _ = rewrite(gm, inputs)
    # The first rewriting left metadata on every node: no example inputs are needed.
    twice, report = rewrite(once, None)
    assert twice.code == once.code
    assert [(site.before, site.changed) for site in report.sites] == [(MERGED, False)]


@every_level
def test_where_nothing_is_saved_the_code_stays_as_it_came(level: str) -> None:
    gm, inputs = LEVELS[level](by_hand(), activation(FEW))
    rewritten, _ = rewrite(gm, inputs)
    assert rewritten.code == gm.code


class _CheckedInterpreter(fx.Interpreter):
    """Runs a graph and holds what each node computes against its example tensor."""

    checked = 0

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor):
            example = n.meta["val"]
            assert (example.shape, example.dtype) == (value.shape, value.dtype), n.name
            assert example.stride() == value.stride(), n.name
            self.checked += 1
        return value


@every_level
@every_rank
def test_emitted_nodes_carry_metadata(batch: tuple[int, ...], level: str) -> None:
    gm, inputs = LEVELS[level](by_hand(), activation(*batch, MANY))
    rewritten, _ = rewrite(gm, inputs)
    rewritten.graph.lint()
    interpreter = _CheckedInterpreter(rewritten)
    interpreter.run(*inputs)
    assert interpreter.checked

    (replaced,) = gm.graph.output_node().all_input_nodes
    names = {node.name for node in gm.graph.nodes}
    emitted = [n for n in rewritten.graph.nodes if n.op == "call_function" and n.name not in names]
    assert emitted
    kept = [key for key in ("nn_module_stack", "stack_trace") if key in replaced.meta]
    assert kept or level == "make_fx"
    for node in emitted:
        for key in kept:
            assert node.meta[key] == replaced.meta[key], f"{node.name}: {key}"


@every_level
def test_a_rewritten_module_can_be_copied_and_pickled(level: str) -> None:
    gm, inputs = LEVELS[level](by_hand(), activation(MANY))
    rewritten, _ = rewrite(gm, inputs)
    copies = [copy.deepcopy(rewritten)]
    if level != "export":  # torch cannot pickle the modules that it unlifts from an export
        copies.append(pickle.loads(pickle.dumps(rewritten)))
    wanted = outputs_and_grads(rewritten, inputs)
    for copied in copies:
        assert_same_values(outputs_and_grads(copied, inputs), wanted, 0.0)


# --- whole models


class Loss(nn.Module):
    """A layer in a model with something non-linear on top."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = LoraLinear()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().square().mean()


def loss_model() -> nn.Module:
    torch.manual_seed(0)
    return Loss().double()


def test_joint_graph_computes_loss_and_gradients() -> None:
    model, x = loss_model(), activation(5 * MANY).requires_grad_()
    joint = runlora_fx.joint_graph(model, [x], strict=True)
    assert isinstance(joint, fx.GraphModule)
    joint.graph.lint()

    # All shapes differ, which tells the placeholders apart.
    sources = {"x": x, **dict(model.named_parameters())}
    by_shape = {tuple(t.shape): name for name, t in sources.items()}
    placeholders = [node for node in joint.graph.nodes if node.op == "placeholder"]
    names = [by_shape[tuple(p.meta["val"].shape)] for p in placeholders if "tangents" not in p.name]
    assert sorted(names) == sorted(sources)

    with torch.no_grad():
        results = joint([sources[name] for name in names], [torch.ones_like(model(x))])
    loss, *grads = tree_leaves(results)
    wanted_loss = model(x)
    wanted = torch.autograd.grad(wanted_loss, [sources[name] for name in names])
    assert_same_values(
        {"loss": loss, **dict(zip(names, grads, strict=True))},
        {"loss": wanted_loss.detach(), **dict(zip(names, wanted, strict=True))},
        RTOL,
    )
    report = runlora_fx.last_report()
    assert report is not None
    assert report.graph == "joint"
    assert report.flops_after < report.flops_before


def test_joint_graph_is_the_forward_where_nothing_needs_a_gradient() -> None:
    model, x = loss_model(), activation(MANY)
    with torch.no_grad():
        forward = runlora_fx.joint_graph(model, [x], strict=True)
    (output,) = (node for node in forward.graph.nodes if node.op == "output")
    assert len(tree_leaves(output.args[0])) == 1
    report = runlora_fx.last_report()
    assert report is not None
    assert (report.graph, [site.after for site in report.sites]) == ("inference", [MERGED])


def test_joint_graph_of_a_model_in_two_graphs_is_an_error() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    with pytest.raises(RuntimeError, match=r"graph_break"):
        runlora_fx.joint_graph(broken, [activation(MANY)])


def test_explain_names_modules_shapes_expressions_and_flops() -> None:
    model, x = loss_model(), activation(MANY)
    with torch.no_grad():
        report = runlora_fx.explain(model, x)
    assert report is runlora_fx.last_report()
    (site,) = report.sites
    assert site.modules == ("layer",)
    assert site.shapes == f"N={MANY}, i={IN}, o={OUT}, r={RANK}"
    text = str(report)
    for said in (
        "layer",
        site.shapes,
        TWO_PATHS,
        MERGED,
        f"{two_path_flops(MANY) / 1e3:.4g} kFLOP -> {MERGED_FLOPS / 1e3:.4g} kFLOP",
        "before: 2*N*i*o + 2*N*i*r + 2*N*o*r FLOP\n",
        "after: 2*N*i*o + 2*i*o*r FLOP\n",
    ):
        assert said in text, said


def test_explain_covers_training_and_every_graph() -> None:
    model = nn.Sequential(Loss(), Loss()).double()

    def broken(x: Tensor) -> Tensor:
        first = model[0](x)
        torch._dynamo.graph_break()
        return first + model[1](x)

    report = runlora_fx.explain(broken, activation(MANY))
    assert report.graph == "joint"
    assert len(report.sites) == 2
    assert "dA = " in str(report)


@pytest.mark.skipif(not APART, reason="before torch 2.13 every look counts as a recompilation")
@pytest.mark.parametrize("look", ("explain", "joint_graph"))
def test_a_model_can_be_looked_at_any_number_of_times(look: str) -> None:
    model, x = loss_model(), activation(MANY)
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        if look == "explain":
            assert len(runlora_fx.explain(model, x).sites) == 1
        else:
            runlora_fx.joint_graph(model, [x])
    # And it can still be compiled.
    torch.compile(model, backend="runlora_eager", fullgraph=True)(x)
