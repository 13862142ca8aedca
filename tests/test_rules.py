"""Rules: every node that is written says which step of the plan it was written for."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import runlora_fx


def test_written_nodes_name_their_step() -> None:
    def fn(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return (x @ w.t() + 2 * (x @ a.t() @ b.t())).sin()

    sizes = ((96, 16), (16, 16), (2, 16), (16, 2))
    gm = make_fx(fn)(*(torch.randn(size) for size in sizes))
    graph = runlora_fx.rewrite(gm, objective="flops", strict=True).graph
    rules = {str(node.target): node.meta.get("runlora") for node in graph.nodes}
    assert rules == {
        **dict.fromkeys(("x_1", "w_1", "a_1", "b_1", "aten.sin.default", "output")),
        "aten.addmm.default": "merged weight: w_1 + 2 b_1 a_1",
        "aten.permute.default": "product: x_1 (w_1' + 2 a_1' b_1')",
        "aten.mm.default": "product: x_1 (w_1' + 2 a_1' b_1')",
    }
