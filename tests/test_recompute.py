"""Tags: one place has the backward compute things again, and the user's own tags stay."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import runlora_fx
from runlora_fx.passes.emit.graph.recompute import (
    keep_random_numbers,
    recompute,
    recompute_dequantised,
)
from runlora_fx.passes.read.effects import Effects

aten = torch.ops.aten
MUST_SAVE, MUST_RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.MUST_RECOMPUTE


def _dequantised(user_tag: Any) -> list[Any]:
    def fn(packed: Tensor, scale: Tensor) -> Tensor:
        return packed.to(torch.float32).mul(2).mul(scale)

    gm = make_fx(fn)(torch.ones(8, 8, dtype=torch.int8), torch.ones(1))
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    if user_tag is not None:
        calls[1].meta["recompute"] = user_tag
    recompute_dequantised(calls[-1:], Effects(gm.graph))
    return [node.meta.get("recompute") for node in calls]


@pytest.mark.parametrize("tag", [None, *CheckpointPolicy])
def test_a_dequantised_weight_is_made_again_but_what_the_user_has_tagged(tag: Any) -> None:
    others, tagged = _dequantised(tag)[::2], _dequantised(tag)[1]
    assert set(others) == {MUST_RECOMPUTE}
    assert tagged == (MUST_RECOMPUTE if tag is None else tag)


@pytest.mark.parametrize("tag", [None, *CheckpointPolicy])
def test_masks_that_the_user_has_tagged_keep_their_tag(tag: Any) -> None:
    def fn(x: Tensor) -> Tensor:
        return torch.rand_like(x).gt(0.5) * x

    gm = make_fx(fn)(torch.ones(8, 8))
    (mask,) = [node for node in gm.graph.nodes if node.target is aten.gt.Scalar]
    if tag is not None:
        mask.meta["recompute"] = tag
    assert keep_random_numbers(gm.graph, Effects(gm.graph)) == ([mask] if tag is None else [])
    assert mask.meta["recompute"] == (MUST_SAVE if tag is None else tag)
    recompute([mask])
    assert mask.meta["recompute"] == (MUST_SAVE if tag is None else tag)


def test_a_copied_tag_of_ours_is_replaced() -> None:
    node = fx.Graph().placeholder("x")
    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
    recompute([node])
    assert node.meta["recompute"] is CheckpointPolicy.PREFER_RECOMPUTE
    recompute([node], ours=[node])
    assert node.meta["recompute"] is MUST_RECOMPUTE


def test_what_only_tagged_nodes_read_is_tagged_with_them() -> None:
    """But for products, which a plan may keep: ``X A'``."""

    def fn(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
        return (b * g) @ (a @ a)

    gm = make_fx(fn)(torch.ones(4, 4), torch.ones(4, 4), torch.ones(4))
    scaled, inner, product = (node for node in gm.graph.nodes if node.op == "call_function")
    recompute([product], ours=[scaled, inner, product])
    assert [node.meta.get("recompute") for node in (scaled, inner, product)] == [
        *(MUST_RECOMPUTE, None, MUST_RECOMPUTE)
    ]


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return MUST_SAVE if op is aten.add.Tensor else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def test_what_a_policy_saves_is_saved_of_the_rewritten_graph() -> None:
    """The result of the adapted layer, not the merged weight that it is made by."""

    def layer(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ w.t() + x @ a.t() @ b.t()).sin().sin()

    def fn(*args: Tensor) -> Any:
        return checkpoint(layer, *args, use_reentrant=False, context_fn=_contexts)

    sizes = ((96, 16), (16, 16), (2, 16), (16, 2))
    inputs = [torch.randn(size, requires_grad=True) for size in sizes]
    torch._dynamo.reset()
    graph = runlora_fx.joint_graph(fn, inputs, strict=True, objective="flops").graph
    report = runlora_fx.last_report()
    assert report is not None
    assert any(site.changed for site in report.sites)
    saved = [n for n in graph.nodes if n.meta.get("recompute") is MUST_SAVE]
    assert [tuple(n.meta["val"].shape) for n in saved] == [(96, 16)]
