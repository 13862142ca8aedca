"""The machine's profile as the runtime estimator of torch's partitioner."""

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor, fx
from torch._functorch.partitioners import estimate_runtime
from torch.fx.experimental.proxy_tensor import make_fx

from runlora_fx import ProfileEstimator
from runlora_fx._torch_compat import TAKES_ESTIMATORS
from runlora_fx.cost_model.cost import FREE, Cost
from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.estimator import cost_of

pytestmark = pytest.mark.skipif(not TAKES_ESTIMATORS, reason="torch takes no estimators")

N = 64


def nodes() -> dict[str, fx.Node]:
    """A node of each kind, by operator."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3)[0, 0]
        return torch.mm(x.t(), w).exp() + w + torch.rand_like(w) + y

    x = torch.randn(N, N)
    graph = make_fx(run, tracing_mode="fake")(x, x).graph
    return {str(n.target): n for n in graph.nodes if n.op == "call_function"}


def test_a_node_costs_its_flops_its_bytes_or_nothing() -> None:
    costs = {name: cost_of(node) for name, node in nodes().items()}
    matrix = N * N * 4
    product = {"flops.nn": 2 * N**3, "read": 2 * matrix, "written": matrix, "launches": 1}
    assert costs["aten.mm.default"] == Cost(product)
    assert costs["aten.exp.default"] == Cost({"elementwise": 2 * matrix, "special": N * N})
    assert costs["aten.add.Tensor"] == Cost({"elementwise": 3 * matrix})
    assert costs["aten.rand_like.default"] == Cost({"elementwise": 2 * matrix, "random": N * N})
    assert costs["aten.t.default"] == FREE
    (attention,) = (cost for name, cost in costs.items() if "attention" in name)
    assert attention["flops.nn"] == 4 * N**3


def test_times_are_those_of_the_profile() -> None:
    profile = PUBLISHED["h100"].profile("float32")
    estimate = ProfileEstimator("h100")
    for node in nodes().values():
        wanted = profile.of(cost_of(node)) * 1e3
        assert estimate(node) == pytest.approx(max(wanted, 1e-9))


def test_a_device_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'h100'"):
        ProfileEstimator("h101")


def test_the_key_changes_with_the_profile() -> None:
    keys = [ProfileEstimator(name).uuid() for name in ("h100", "h100", "a100")]
    assert keys[0] == keys[1] != keys[2]


def test_the_partitioner_asks_it() -> None:
    asked: list[fx.Node] = []

    class Listening(ProfileEstimator):
        def __call__(self, node: fx.Node) -> float:
            asked.append(node)
            return super().__call__(node)

    narrow = torch.randn(4, 256)

    def run(x: Tensor) -> Tensor:
        made = (x @ narrow).pow(3).sin()
        return (made @ made.t()).sum()

    torch._dynamo.reset()
    x = torch.randn(256, 4, requires_grad=True)
    estimator = Listening("h100")
    with functorch_config.patch(
        activation_memory_budget=0.5,
        activation_memory_budget_runtime_estimator=estimator,
    ):
        torch.compile(run, backend="runlora_eager", fullgraph=True)(x).backward()
        products = [node for node in asked if str(node.target) == "aten.mm.default"]
        assert products
        for node in products:
            assert estimate_runtime(node) == ProfileEstimator("h100")(node)
    (gradient,) = torch.autograd.grad(run(x), x)
    torch.testing.assert_close(x.grad, gradient, rtol=1e-4, atol=1e-4)
