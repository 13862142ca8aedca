"""Counts: what Inductor's kernels read, write and multiply, without running them.

    count_of(model, inputs, {"runlora.device": "h100"})     ->  bytes moved and kept, FLOPs, kernels

Forward and backward are compiled as far as Inductor's scheduler, which says what each kernel reads
and writes. Nothing is run and no tensor needs data.

Invariant: equal versions of torch and this package give equal numbers on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch import Tensor, fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_utils import count_flops_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.ir import ExternKernelOut
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.utils import sympy_product

from runlora_fx.backend import runlora
from runlora_fx.cost_model.published import PublishedDevice
from runlora_fx.integrations.own_compile import own_backend
from runlora_fx.without_data import without_data


@dataclass(frozen=True)
class Kernel:
    """One kernel of Inductor's schedule.

    Attributes:
        moved: Bytes that it reads and writes [B].
        flops: Of its products [FLOP].
        dtype: Of what it makes, as torch names it.
    """

    moved: int
    flops: int
    dtype: str

    def seconds(self, device: PublishedDevice) -> float:
        """The longer of its bytes and its FLOPs at a device's published peaks [s]."""
        return max(self.moved / device.bandwidth, self.flops / device.peak(self.dtype))


@dataclass
class Count:
    """What one variant costs.

    Attributes:
        kernels: Of forward and backward.
        kept: From the forward to the backward [B].
        results: Of the forward that is compiled now.
    """

    kernels: list[Kernel] = field(default_factory=list)
    kept: int = 0
    results: int = 1

    @property
    def moved(self) -> int:
        """Bytes moved [B]."""
        return sum(kernel.moved for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """FLOPs of products [FLOP]."""
        return sum(kernel.flops for kernel in self.kernels)

    def milliseconds(self, device: PublishedDevice) -> float:
        """The roofline of a device: predicted from counts [ms]."""
        return 1e3 * sum(kernel.seconds(device) for kernel in self.kernels)


@contextmanager
def counting(count: Count) -> Iterator[None]:
    """Have Inductor count the kernels of what it schedules, and write no code."""

    def counted(graph: GraphLowering) -> Any:
        graph.init_wrapper_code()
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            moved = moved_bytes(node)
            if moved:
                # An operator with several results, such as attention, has no dtype of its own.
                layout = node.get_nodes()[0].get_outputs()[0].node.layout
                dtype = str(getattr(layout, "dtype", torch.bfloat16)).removeprefix("torch.")
                count.kernels.append(Kernel(moved, flops_of(node), dtype))
        if not graph.is_backward and not graph.is_inference:
            count.kept = kept_bytes(graph.orig_gm.graph, count.results)
        return _Nothing()

    original = GraphLowering.compile_to_module
    GraphLowering.compile_to_module = counted  # type: ignore[method-assign]
    try:
        with (
            inductor_config.patch(fx_graph_cache=False),
            functorch_config.patch(
                force_non_lazy_backward_lowering=True, enable_autograd_cache=False
            ),
        ):
            yield
    finally:
        GraphLowering.compile_to_module = original  # type: ignore[method-assign]


class _Nothing:
    """What stands for a compiled module that is never called."""

    __file__ = key = "none"
    call = staticmethod(lambda inputs: None)


def moved_bytes(node: BaseSchedulerNode) -> int:
    """What a kernel reads and writes [B].

    Inductor counts the whole buffer where a product reads a part of it. Here only the part counts.
    """
    kernel = node.node
    if not isinstance(kernel, ExternKernelOut):
        return node.get_read_write_buffers_sizes()
    tensors = [*kernel.inputs, kernel]
    return sum(int(sympy_product(t.get_size())) * t.get_dtype().itemsize for t in tensors)


def flops_of(node: BaseSchedulerNode) -> int:
    """The FLOPs of the products that a kernel computes [FLOP]."""
    products = [part for part in node.get_nodes() if part.is_extern() or part.is_template()]
    total = 0
    for product in products:
        # A product that a pattern of Inductor's made has several origins, each with its count.
        origins = product.node.get_origins() if product.node is not None else ()
        total += max((int(count_flops_fx(origin) or 0) for origin in origins), default=0)
    return total


def kept_bytes(forward: fx.Graph, results: int) -> int:
    """What a forward leaves for the backward, its inputs apart; each storage once [B]."""
    outputs = forward.output_node().args[0]
    assert isinstance(outputs, Sequence)
    # The results come first.
    saved = [n for n in outputs[results:] if isinstance(n, fx.Node) and n.op != "placeholder"]
    storages = {n.meta["val"].untyped_storage()._cdata: n.meta["val"] for n in saved}
    return sum(val.untyped_storage().nbytes() for val in storages.values())


def count_of(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    options: Mapping[str, Any] | None,
    *,
    autocast: bool = False,
) -> Count:
    """Compile a model's training step as far as Inductor's scheduler.

    Args:
        model: The model; its tensors may be on the meta device.
        inputs: What it is called with.
        options: Of our backend, without their prefix; None is Inductor's own backend.
        autocast: Whether the step runs under autocast to bfloat16.
    """
    torch._dynamo.reset()
    count = Count()

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        count.results = len(gm.graph.output_node().args[0])  # type: ignore[arg-type]
        if options is None:
            compile_fx(gm, given)  # type: ignore[arg-type]
        else:
            runlora(gm, given, options={f"runlora.{k}": v for k, v in options.items()})
        return gm.forward  # traced once more, and never run on data

    cast = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with counting(count), without_data(model, inputs, {}) as (given, _), cast:
        # PEFT's DoRA breaks the graph, and runs the parts between unseen. As our own compilation it
        # is traced whole, under Inductor too, which favours the baseline.
        torch.compile(model, backend=own_backend(backend), fullgraph=True, dynamic=False)(*given)
    return count
