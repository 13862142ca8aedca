"""Grouped products of mixtures of experts, with PEFT's adapters on their weights.

This is how transformers multiplies by experts unless told otherwise: tokens sorted by expert, and
one operator for all. Few tokens are multiplied by the adapter's factors, not by merged stacks.
"""

import pytest
import torch
from checks import (
    RUNLORA,
    RUNLORA_EAGER,
    assert_same_outputs_and_grads,
    assert_same_values,
    compile_whole,
    ours,
    relative_error,
    run_training,
    saved_bytes,
    scalar_kernels,
)
from mixtures import EXPERTS, FFN, HIDDEN, adapted, batch
from test_experts import Logits, merges
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters

import runlora_fx
from runlora_fx.history import collecting
from runlora_fx.passes.levels.operators import VIEWS

RTOL = 1e-5
ENDS = (3, 3, 9, 16)  # where the rows of each of four experts end: one has none


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> None:
    """Dynamo makes a size symbolic that it has seen change; such graphs keep their merges."""
    torch._dynamo.reset()


class Grouped(nn.Module):
    """``x (W + 2 L R)``, or its transpose, for rows sorted by expert.

    In bf16, and of a rank that is a multiple of 8: the operator knows nothing else.
    """

    def __init__(self, *, transposed: bool, rank: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator).bfloat16() / 8)

        self.weight = random(EXPERTS, HIDDEN, FFN).requires_grad_(False)
        self.left, self.right = random(EXPERTS, HIDDEN, rank), random(EXPERTS, rank, FFN)
        self.transposed = transposed

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        merged = torch.baddbmm(self.weight, self.left, self.right, alpha=2.0)
        product: Tensor = torch._grouped_mm(x, merged.mT if self.transposed else merged, offs=ends)
        return product


def rows(width: int, count: int = ENDS[-1]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, width, generator=generator).bfloat16().requires_grad_()


def ends(scale: int = 1) -> Tensor:
    return torch.tensor([scale * end for end in ENDS], dtype=torch.int32)


def operators(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("transposed", (False, True))
def test_values_and_gradients_of_the_operator(transposed: bool) -> None:
    """Products with L and R only: of the size of the stack nothing is made."""
    model, x = Grouped(transposed=transposed), rows(FFN if transposed else HIDDEN)
    joint = runlora_fx.joint_graph(model, (x, ends()), strict=True)
    stacks = [n for n in joint.graph.nodes if n.op == "call_function" and is_stack(n)]
    assert [n.name for n in stacks if n.target not in VIEWS] == []
    assert "aten.baddbmm.default" not in operators(joint)
    compiled = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, ends()], 4 * 2.0**-8)


def is_stack(node: fx.Node) -> bool:
    shape = list(getattr(node.meta.get("val"), "shape", ()))
    return sorted(shape) == sorted([EXPERTS, HIDDEN, FFN])


def test_ranks_that_the_operator_does_not_take_keep_the_merged_stack() -> None:
    model, x = Grouped(transposed=False, rank=4), rows(HIDDEN)
    joint = runlora_fx.joint_graph(model, (x, ends()), strict=True)
    assert "aten.baddbmm.default" in operators(joint)


# Splitting pays up to 4 * 64 * 128 / (64 + 128) = 170 rows in inference.
@pytest.mark.parametrize(("scale", "merged"), ((1, False), (10, False), (11, True)))
def test_many_rows_keep_the_merged_stack(scale: int, merged: bool) -> None:
    model, x = Grouped(transposed=False), rows(HIDDEN, scale * ENDS[-1]).detach()
    with torch.no_grad():
        joint = runlora_fx.joint_graph(model, (x, ends(scale)), strict=True)
    assert ("aten.baddbmm.default" in operators(joint)) == merged


def test_a_stack_that_is_needed_anyway_is_multiplied_by() -> None:
    class Both(Grouped):
        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            merged = torch.baddbmm(self.weight, self.left, self.right)
            product: Tensor = torch._grouped_mm(x, merged, offs=ends)
            return product * merged.norm()

    model, x = Both(transposed=False), rows(HIDDEN).detach()
    with torch.no_grad():
        joint = runlora_fx.joint_graph(model, (x, ends()), strict=True)
    assert operators(joint).count("aten._grouped_mm.default") == 1
    assert "aten.baddbmm.default" in operators(joint)


def test_a_gradient_that_is_needed_anyway_is_made() -> None:
    """Where the base weights train too, their gradient is that of the stack."""
    model = Grouped(transposed=False)
    model.weight.requires_grad_(True)
    x = rows(HIDDEN)
    compiled = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, ends()], 4 * 2.0**-8)


@pytest.mark.parametrize("backend", (RUNLORA_EAGER, RUNLORA))
@scalar_kernels
def test_factors_that_lie_interleaved_are_copied_for_the_operator(backend: str) -> None:
    """As PEFT keeps them: ``(out, rank, experts)``. No dimension of a matrix is contiguous.

    Inductor gives a copy the layout of what it reads, unless told otherwise.
    """

    class Interleaved(Grouped):
        def __init__(self) -> None:
            super().__init__(transposed=False)
            self.left = nn.Parameter(self.left.detach().permute(1, 2, 0).contiguous())
            self.right = nn.Parameter(self.right.detach().permute(2, 1, 0).contiguous())

        def forward(self, x: Tensor, ends: Tensor) -> Tensor:
            left, right = self.left.permute(2, 0, 1), self.right.permute(2, 1, 0)
            merged = torch.baddbmm(self.weight, left, right, alpha=2.0)
            product: Tensor = torch._grouped_mm(x, merged, offs=ends)
            return product

    model, x = Interleaved(), rows(HIDDEN)
    compiled = torch.compile(model, backend=backend, fullgraph=True, options=ours())
    assert_same_outputs_and_grads(model, compiled, [x, ends()], 4 * 2.0**-8)
    joint = runlora_fx.joint_graph(model, (x, ends()), strict=True)
    assert merges(joint.graph) == 0


@pytest.mark.parametrize(
    "name", ("mixtral", "gpt-oss", pytest.param("qwen3-moe", marks=pytest.mark.slow))
)
def test_models_train_as_in_eager_mode(name: str) -> None:
    """One graph, equal losses and gradients; neither merged stacks nor their gradients are made."""
    model = adapted(name, "grouped_mm")
    wanted = run_training(model, batch())
    compiled = compile_whole(model, RUNLORA_EAGER)
    assert_same_values(run_training(compiled, batch()), wanted, RTOL)
    joint = runlora_fx.joint_graph(Logits(model), (batch()["input_ids"],), strict=True)
    assert merges(joint.graph) == 0
    assert not any(is_stack(n) and "grouped" in n.name for n in joint.graph.nodes)


def test_merged_stacks_are_not_held() -> None:
    model = adapted("qwen3-moe", "grouped_mm")
    given = [*model.parameters(), *model.buffers(), *batch().values()]
    saved = {}
    for backend in ("aot_eager_decomp_partition", RUNLORA_EAGER):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, fullgraph=backend == RUNLORA_EAGER)
        run_training(compiled, batch())
        saved[backend] = saved_bytes(lambda run=compiled: run(**batch()), given)
    stack = 4 * EXPERTS * HIDDEN * FFN
    assert saved[RUNLORA_EAGER] < saved["aot_eager_decomp_partition"] - stack


def test_numbers_of_rows_that_vary_have_two_graphs() -> None:
    """One guard, where both forms cost the same, and no recompilation but for crossing it."""
    model = Grouped(transposed=False)
    run = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, dynamic=True, options=ours())
    counters.clear()
    with torch.no_grad(), collecting() as reports:
        for scale in (1, 40, 2, 60, 3, 10, 11, 1, 50):
            x, offsets = rows(HIDDEN, scale * ENDS[-1]), ends(scale)
            assert relative_error(run(x, offsets), model(x, offsets)) < 4 * 2.0**-8
    assert counters["stats"]["unique_graphs"] == 2
    few, many = (report.sites[-1] for report in reports)
    assert few.changed
    assert not many.changed
    # 4 * 64 * 128 / (64 + 128) rows cost the same.
    assert few.break_even.endswith(">= 171")
    assert many.break_even.endswith(">= 171")


def test_in_training_any_number_of_rows_is_split() -> None:
    """The gradient of the stack, a product of its own, is never made: no guard is needed."""
    model = Grouped(transposed=False)
    run = torch.compile(model, backend=RUNLORA_EAGER, fullgraph=True, dynamic=True, options=ours())
    counters.clear()
    with collecting() as reports:
        for scale in (1, 40, 2, 60):
            x = rows(HIDDEN, scale * ENDS[-1])
            assert_same_outputs_and_grads(model, run, [x, ends(scale)], 4 * 2.0**-8)
    assert counters["stats"]["unique_graphs"] == 1
    assert [site.changed for report in reports for site in report.sites] == [True]
