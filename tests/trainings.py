"""Training a flavour of LoRA for a few steps, and what its compiled graphs do and cost.

Nothing is timed. Graphs go through Dynamo, AOTAutograd, Inductor's joint passes and partitioner.
What remains, the generation of kernels, is replaced by running the graphs operator by operator:
that leaves FLOPs and saved tensors as they are, and takes a tenth of the time. A test of its own
generates kernels for some flavours and compares. Random numbers are drawn as in eager mode.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as inductor_compile
import torch._inductor.config as inductor_config
from checks import INDUCTOR, RUNLORA, ours, saved_bytes
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from runlora_fx.history import collecting
from runlora_fx.report.data import Report

STEPS = 3

Batch = Mapping[str, Tensor]
Expects = Literal["gain", "bytes", "alone", "breaks"]


def squared_distance(output: Any, batch: Batch) -> Tensor:
    """Half the squared distance of an output tensor from the batch's target, mean over tokens."""
    return 0.5 * (output.float() - batch["target"].float()).square().sum(-1).mean()


def own_loss(output: Any, _: Batch) -> Tensor:
    """The loss that the model returns."""
    loss: Tensor = output.loss
    return loss


def sgd(model: nn.Module, lr: float = 0.05) -> torch.optim.Optimizer:
    """Gradient descent with momentum: its updates amplify no error, as those of Adam may."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=lr, momentum=0.9)


def _nothing(model: nn.Module, step: int) -> None:
    pass


def _no_context(model: nn.Module, step: int) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Flavour:
    """A way to fine-tune with low-rank adapters, on a tiny model.

    Attributes:
        source: The library that it comes from, or the paper and the part that is implemented.
        build: Makes the model, in training mode, from torch's global seed.
        batch: Makes the batch: arguments of the model, and a "target" for `loss`.
        expects: "gain": the matrix products must have fewer FLOPs. "bytes": as many FLOPs, and
            fewer bytes saved for the backward. "alone": there is nothing to gain. "breaks": it
            does not compile under Inductor either.
        why: The reason if it is not "gain". For "bytes": what is saved instead of what.
        loss: The loss of the model's output.
        optimizer: Makes the optimizer; None where `after` updates the weights.
        before: Called with model and step before the forward.
        around: A context around forward and backward.
        after: Called with model, optimizer and step after the optimizer's step.
        autocast: Dtype of an autocast around the forward.
        options: Options of ours.
        dynamo: Settings of `torch._dynamo.config`.
        rtol: Largest relative error against eager mode, of outputs, gradients and parameters.
        compared: What is compared of the model's state, by name.
        kernels: Whether the test that generates kernels includes it.
        substituted: Whether our own compilations trace a substitute for a function of PEFT. Under
            Inductor that function breaks the graph, and parts of the model run outside of graphs.
        needs: Optional packages that it imports.
    """

    source: str
    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    expects: Expects = "gain"
    why: str = ""
    loss: Callable[[Any, Batch], Tensor] = squared_distance
    optimizer: Callable[[nn.Module], torch.optim.Optimizer | None] = sgd
    before: Callable[[nn.Module, int], None] = _nothing
    around: Callable[[nn.Module, int], AbstractContextManager[None]] = _no_context
    after: Callable[[nn.Module, Any, int], None] = lambda model, optimizer, step: None
    autocast: torch.dtype | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    dynamo: Mapping[str, object] = field(default_factory=dict)
    rtol: float = 1e-5
    compared: Callable[[nn.Module], Mapping[str, Tensor]] = lambda m: dict(m.named_parameters())
    kernels: bool = False
    substituted: bool = False
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Require a reason if nothing is gained."""
        assert (self.expects == "gain") != bool(self.why)

    def model(self) -> nn.Module:
        """The model, always with the same weights."""
        torch.manual_seed(0)
        return self.build()


@dataclass(frozen=True)
class Trained:
    """A flavour after some steps.

    Attributes:
        values: Of each step: outputs, gradients, and parameters after it.
        graphs: Graphs compiled by the end of each step.
        breaks: Graph breaks.
        products: FLOPs of the matrix products that compiled graphs ran in all steps; in eager mode
            those of the model. Under Inductor it is the latter for a flavour that is
            :attr:`~Flavour.substituted`: Inductor reorders none of them [FLOP].
        saved: Bytes saved for the backward [B].
        reports: The report of each graph; empty unless the backend is ours.
    """

    values: list[dict[str, Tensor]] = field(repr=False)
    graphs: tuple[int, ...] = ()
    breaks: int = 0
    products: int = 0
    saved: int = 0
    reports: tuple[Report, ...] = ()

    @property
    def matched(self) -> tuple[int, int]:
        """Sites that were changed, and sites that were found."""
        sites = [site for report in self.reports for site in report.sites]
        return sum(site.changed for site in sites), len(sites)


# Grouped products that torch has no formula for: how many products each computes.
GROUPED = {
    "transformers.grouped_mm_fallback.default": 1,
    "transformers.grouped_mm_fallback_backward.default": 2,
}


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products and convolutions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and add what it costs."""
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops += count(*args, **(kwargs or {}), out_val=found)
        elif (products := GROUPED.get(str(func))) is not None:
            rows, stack = args[:2]
            self.flops += products * 2 * rows.numel() * stack.shape[-1]
        return found


@contextmanager
def without_kernels(products: Products) -> Iterator[None]:
    """Let Inductor hand its graphs to an interpreter, which counts their products."""

    def interpreted(gm: fx.GraphModule, _: Any, **__: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with products:
                return gm(*args)

        boxed: Callable[..., Any] = make_boxed_func(run)
        return boxed

    compile_fx = partial(inductor_compile.compile_fx, inner_compile=interpreted)
    original, inductor_compile.compile_fx = inductor_compile.compile_fx, compile_fx
    try:
        yield
    finally:
        inductor_compile.compile_fx = original


def eager(flavour: Flavour) -> Trained:
    """Train in eager mode."""
    model, products = flavour.model(), Products()
    with products:
        values = list(steps(flavour, model, model))
    return Trained(values, products=products.flops)


def compiled(flavour: Flavour, backend: str, *, kernels: bool = False) -> Trained:
    """Train under a backend.

    Args:
        flavour: What to train.
        backend: `RUNLORA` or `INDUCTOR`.
        kernels: Whether Inductor generates kernels; no FLOPs are counted then.
    """
    torch._dynamo.reset()
    counters.clear()
    products = Products()
    options: Any = None
    if backend == RUNLORA:
        options = ours(**{"objective": "flops", **flavour.options})
    with ExitStack() as stack:
        reports = stack.enter_context(collecting())
        for patch in (
            inductor_config.patch({"fallback_random": True, "fx_graph_cache": False}),
            inductor_config.patch({"cpp.simdlen": 1}),
            functorch_config.patch(enable_autograd_cache=False),
            torch._dynamo.config.patch(dict(flavour.dynamo)),
            nullcontext() if kernels else without_kernels(products),
        ):
            stack.enter_context(patch)
        model = flavour.model()
        run = torch.compile(model, backend=backend, options=options)
        values, graphs = [], []
        for step in steps(flavour, model, run):
            values.append(step)
            graphs.append(counters["stats"]["unique_graphs"])
        flops = products.flops
        if backend == INDUCTOR and flavour.substituted:
            flops = eager(flavour).products
        batch = flavour.batch()
        given = [*model.parameters(), *model.buffers(), *batch.values()]
        saved = saved_bytes(lambda: forward(flavour, run, batch), given)
    breaks = sum(counters["graph_break"].values())
    return Trained(values, tuple(graphs), breaks, flops, saved, tuple(reports))


def steps(
    flavour: Flavour, model: nn.Module, run: Callable[..., Any]
) -> Iterator[dict[str, Tensor]]:
    """Train for some steps, with the same random numbers for everyone who does.

    Args:
        flavour: What is trained.
        model: The model that holds the parameters.
        run: What to call: the model, or the compiled model.

    Yields:
        The output, the gradients and the parameters of each step.
    """
    optimizer, batch = flavour.optimizer(model), flavour.batch()
    for step in range(STEPS):
        torch.manual_seed(step)
        flavour.before(model, step)
        with flavour.around(model, step):
            output = forward(flavour, run, batch)
            loss = flavour.loss(output, batch)
            loss.backward()
        values = {f"output {i}": y.detach().clone() for i, y in enumerate(tensors(output))}
        values["loss"] = loss.detach()
        for name, weight in model.named_parameters():
            if weight.requires_grad and weight.grad is not None:
                values[f"gradient of {name}"] = weight.grad.clone()
        if optimizer is not None:
            optimizer.step()
        flavour.after(model, optimizer, step)
        model.zero_grad(set_to_none=True)
        state = flavour.compared(model).items()
        yield values | {name: value.detach().clone() for name, value in state}


def forward(flavour: Flavour, run: Callable[..., Any], batch: Batch) -> Any:
    """One forward, under the flavour's autocast."""
    arguments = {name: value for name, value in batch.items() if name != "target"}
    if flavour.autocast is None:
        return run(**arguments)
    with torch.autocast("cpu", flavour.autocast):
        return run(**arguments)


def tensors(output: Any) -> list[Tensor]:
    """The floating tensors of an output."""
    return [y for y in tree_leaves(output) if isinstance(y, Tensor) and y.is_floating_point()]
