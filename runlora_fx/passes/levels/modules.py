"""Modules: calls of torch's own modules that are linear algebra.

    call_module lin(x)   ->   X W' + 1 b', with W and b the parameters of ``lin``

The parameters are virtual leaves. Their ``get_attr`` nodes are written only if a plan needs them,
so a call that no plan changes stays a call of the module.

Invariant: a module is read only if calling it is exactly what its class computes.
"""

from __future__ import annotations

from torch import fx, nn
from torch.nn.utils import parametrize

from runlora_fx.passes.levels.cuts import last_dim_cut
from runlora_fx.passes.levels.forms import (
    Copy,
    Form,
    MatrixProduct,
    Operand,
    RepeatedRow,
    VirtualOperand,
    WeightedSum,
)
from runlora_fx.passes.levels.origins import Attribute
from runlora_fx.passes.levels.sizes import example_of


def is_hooked(module: nn.Module) -> bool:
    """True if calling a module also calls hooks, or a ``forward`` of its own."""
    hooks = (
        *(module._forward_hooks, module._forward_pre_hooks),
        *(module._backward_hooks, module._backward_pre_hooks),
    )
    return any(hooks) or "forward" in vars(module)


def is_plain_linear(module: nn.Module) -> bool:
    """True if calling the module is exactly ``F.linear`` with its parameters."""
    is_changed = is_hooked(module) or parametrize.is_parametrized(module)
    return type(module) is nn.Linear and not is_changed


def drops_nothing(module: nn.Module) -> bool:
    """True if calling the module is the identity, in training or not."""
    if type(module) is nn.Dropout:
        return module.p == 0 and not module.inplace and not is_hooked(module)
    return type(module) is nn.Identity and not is_hooked(module)


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a node calls on one tensor; None if the graph belongs to no module."""
    owner = node.graph.owning_module
    is_call = node.op == "call_module" and len(node.args) == 1 and not node.kwargs
    return owner.get_submodule(str(node.target)) if is_call and owner is not None else None


def read_module(node: fx.Node) -> Form | None:
    """What a call of a module computes; None if it is not readable linear algebra."""
    module, here, x = module_of(node), example_of(node), node.args[0] if node.args else None
    source = example_of(x)
    if module is None or here is None or source is None or not isinstance(x, fx.Node):
        return None
    if drops_nothing(module):
        return Copy(x)
    if not isinstance(module, nn.Linear) or not is_plain_linear(module) or source.dim() < 1:
        return None
    if any(parameter.dtype != here.dtype for parameter in module.parameters()):
        return None
    cut = last_dim_cut(source.dim())
    rows, cols = module.weight.shape
    weight = Attribute(f"{node.target}.weight", node, module.weight)
    product = MatrixProduct(Operand(x, cut), VirtualOperand(weight, rows, cols).T, cut)
    if module.bias is None:
        return product
    bias = RepeatedRow(Attribute(f"{node.target}.bias", node, module.bias), rows)
    return WeightedSum.of((product, 1.0), (bias, 1.0))
