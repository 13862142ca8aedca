"""What single calls do: a table of operators, functions, methods and modules."""

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from runlora_fx.passes.levels.aten import ATEN
from runlora_fx.passes.levels.torch_functions import TORCH
from runlora_fx.passes.read import calls
from runlora_fx.passes.read.effects import Effects

aten = torch.ops.aten


class _X:
    """The place of a tensor in a row of the table; ``W`` is one that the call modifies."""

    def __init__(self, name: str) -> None:
        self.name = name


X, Y, W = _X("x"), _X("y"), _X("w")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def _mine(x: Any) -> Any:
    return x


_LIBRARY = torch.library.Library("runlora_tests", "DEF")
_LIBRARY.define("untagged(Tensor x) -> Tensor")
_LIBRARY.define("fills(Tensor x, Tensor(a!) w) -> ()")
_LIBRARY.impl("untagged", torch.clone, "CompositeExplicitAutograd")

# Target, arguments, keyword arguments, then: p for pure, r for random.
TABLE: list[tuple[Any, tuple[Any, ...], dict[str, Any], str]] = [
    # operators of ATen
    (aten.mm.default, (X, Y), {}, "p"),
    (aten.add_.Tensor, (W, X), {}, ""),
    (aten.add.out, (X, Y), {"out": W}, ""),
    (aten.copy_.default, (W, X), {}, ""),
    (aten._foreach_add_.Scalar, ([W, W], 1.0), {}, ""),
    (aten._foreach_add.Scalar, ([X, Y], 1.0), {}, "p"),
    (aten.dropout.default, (X, 0.5, True), {}, "r"),
    (aten.dropout.default, (X, 0.5, False), {}, "p"),
    (aten.dropout.default, (X, 0.0, True), {}, "p"),
    (aten.native_dropout.default, (X, 0.5, True), {}, "r"),
    (aten.rand_like.default, (X,), {}, "r"),
    (aten.bernoulli.p, (X, 0.5), {}, "r"),
    (aten.bernoulli_.float, (W, 0.5), {}, "r"),
    (aten.empty.memory_format, ([2],), {}, "r"),
    (aten.new_empty.default, (X, [2]), {}, "r"),
    (aten.scaled_dot_product_attention.default, (X, X, X, None, 0.1), {}, "r"),
    (aten.native_batch_norm.default, (X, None, None, W, W, True, 0.1, 1e-5), {}, ""),
    (aten.native_batch_norm.default, (X, None, None, Y, Y, False, 0.1, 1e-5), {}, "p"),
    (aten.batch_norm.default, (X, None, None, W, W, True, 0.1, 1e-5, False), {}, ""),
    (aten._native_batch_norm_legit.default, (X, None, None, W, W, True, 0.1, 1e-5), {}, ""),
    (aten.instance_norm.default, (X, None, None, W, W, True, 0.1, 1e-5, False), {}, ""),
    (torch.ops.runlora_tests.untagged.default, (X,), {}, ""),
    (torch.ops.runlora_tests.fills.default, (X, W), {}, ""),
    (torch.ops.runlora_tests.fills.default, (X,), {"w": W}, ""),
    # functions
    (torch.add, (X, Y), {}, "p"),
    (torch.add, (X, Y), {"out": W}, ""),
    (aten.add, (X, Y), {}, "p"),
    (aten.add, (X, Y), {"out": W}, ""),
    (operator.add, (X, Y), {}, "p"),
    (operator.iadd, (W, X), {}, ""),
    (operator.setitem, (W, 0, X), {}, ""),
    (operator.getitem, (X, 0), {}, "p"),
    (setattr, (W, "data", X), {}, ""),
    (F.relu, (X,), {}, "p"),
    (F.relu, (X, False), {}, "p"),
    (F.relu, (W, True), {}, ""),
    (F.relu, (W,), {"inplace": True}, ""),
    (F.leaky_relu, (W, 0.1, True), {}, ""),
    (F.dropout, (X,), {}, "r"),
    (F.dropout, (X, 0.5, True), {}, "r"),
    (F.dropout, (X, 0.5, False), {}, "p"),
    (F.dropout, (X, 0), {}, "p"),
    (F.dropout, (X,), {"training": False}, "p"),
    (F.dropout, (W, 0.5, True, True), {}, "r"),
    (torch.dropout, (X, 0.5, True), {}, "r"),
    (torch.dropout, (X,), {"p": 0.5, "train": False}, "p"),
    (F.alpha_dropout, (X, 0.5, True), {}, "r"),
    (F.feature_alpha_dropout, (X, 0.5, True), {}, "r"),
    (torch.feature_dropout, (X, 0.5, True), {}, "r"),
    (F.dropout2d, (X,), {}, "r"),
    (F.rrelu, (X,), {"training": True}, "r"),
    (F.gumbel_softmax, (X,), {}, "r"),
    (F.fractional_max_pool2d, (X, 2), {"output_size": 3}, "r"),
    (F.scaled_dot_product_attention, (X, X, X), {"dropout_p": 0.5}, "r"),
    (F.batch_norm, (X, W, W, None, None, True), {}, ""),
    (F.batch_norm, (X,), {"running_mean": W, "running_var": W, "training": True}, ""),
    (F.instance_norm, (X, W, W), {}, ""),
    (F.embedding, (X, Y), {}, "p"),
    (F.embedding, (X, W, None, 0.5), {}, ""),
    (F.normalize, (X, 2.0, 1, 1e-12, W), {}, ""),
    (torch.bernoulli, (X,), {}, "r"),
    (torch.multinomial, (X, 3), {}, "r"),
    (torch.rand_like, (X,), {}, "r"),
    (torch.normal, (X, Y), {}, "r"),
    (torch.poisson, (X,), {}, "r"),
    (torch.randperm, (3,), {}, "r"),
    (torch.empty, (3,), {}, "r"),
    (torch.empty_like, (X,), {}, "r"),
    (torch.lstm, (X, [Y], [], True, 1, 0.5, True, False, False), {}, "r"),
    (torch._foreach_mul_, ([W, W], 2.0), {}, ""),
    (nn.init.normal_, (W,), {}, "r"),
    (torch.Tensor.add_, (W, X), {}, ""),
    (_Doubled.apply, (W,), {}, "r"),
    (_mine, (W,), {}, "r"),
    (torch.ops.higher_order.tag_activation_checkpoint, (W,), {}, "r"),
    # methods
    ("relu", (X,), {}, "p"),
    ("bernoulli", (X,), {}, "r"),
    ("random_", (W,), {}, "r"),
    ("normal_", (W,), {}, "r"),
    ("copy_", (W, X), {}, ""),
    ("__iadd__", (W, X), {}, ""),
    ("__setitem__", (W, 0, X), {}, ""),
    ("item", (X,), {}, ""),
    ("new_empty", (X, 3), {}, "r"),
    ("to", (X, torch.float32), {}, "p"),
]


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: f"{row[0] if isinstance(row[0], str) else calls.name_of(row[0])}"
)
def test_table(row: tuple[Any, tuple[Any, ...], dict[str, Any], str]) -> None:
    target, args, kwargs, expected = row
    found = "p" * calls.is_pure(target, args, kwargs) + "r" * calls.is_random(target, args, kwargs)
    written = list(calls.written_arguments(target, args, kwargs))
    assert found == expected
    assert {x.name for x in _flat(written)} == {x.name for x in _flat((args, kwargs)) if x is W}


def _flat(x: Any) -> list[_X]:
    if isinstance(x, dict):
        return _flat(list(x.values()))
    if isinstance(x, list | tuple):
        return [leaf for y in x for leaf in _flat(y)]
    return [x] if isinstance(x, _X) else []


@pytest.mark.parametrize("dialect", [TORCH, ATEN], ids=lambda dialect: dialect.name)
def test_what_a_level_reads_is_known_to_be_pure(dialect: Any) -> None:
    dropouts = {F.dropout, torch.dropout, aten.dropout.default}
    for target in dialect.readers:
        args = (X, 0.5, False) if target in dropouts else (X, Y)
        assert calls.is_pure(target, args, {}), target


@pytest.mark.parametrize(
    ("target", "args", "expected"),
    [
        (aten.view.default, (X, [2]), {"x"}),
        (aten.mm.default, (X, Y), set()),
        (aten.matmul.default, (X, Y), set()),
        (aten._unsafe_view.default, (X, [2]), {"x"}),
        (aten.dropout.default, (X, 0.5, False), {"x"}),
        (aten.type_as.default, (X, Y), {"x", "y"}),
        (aten.einsum.default, ("ij->ji", [X]), {"x"}),
        (torch.einsum, ("ij->ji", X), {"x"}),
        (torch.einsum, ("ij,jk->ik", X, Y), set()),
        (torch.broadcast_tensors, (X, Y), {"x", "y"}),
        (F.linear, (X, Y), set()),
        (torch.atleast_2d, (X,), {"x"}),
        ("contiguous", (X,), {"x"}),
        ("clone", (X,), set()),
        (_mine, (X, Y), {"x", "y"}),
    ],
)
def test_views(target: Any, args: tuple[Any, ...], expected: set[str]) -> None:
    assert {x.name for x in _flat(list(calls.viewed_arguments(target, args, {})))} == expected


# --- modules


class _Owner(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


class _Users(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


def _hooked() -> nn.Module:
    module = nn.Linear(4, 4)
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize(
    ("module", "is_random", "writes_input", "writes_state"),
    [
        (nn.Linear(4, 4), False, False, False),
        (nn.ReLU(), False, False, False),
        (nn.ReLU(inplace=True), False, True, False),
        (nn.Dropout(0.5), True, False, False),
        (nn.Dropout(0.5).eval(), False, False, False),
        (nn.Dropout(0.5, inplace=True), True, True, False),
        (nn.BatchNorm1d(4), False, False, True),
        (nn.BatchNorm1d(4).eval(), False, False, False),
        (nn.BatchNorm1d(4, track_running_stats=False), False, False, False),
        (nn.Embedding(4, 4, max_norm=1.0), False, False, True),
        (_hooked(), True, True, True),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), True, True, True),
        (_Users(), True, True, False),
    ],
)
def test_modules(
    module: nn.Module, is_random: bool, writes_input: bool, writes_state: bool
) -> None:
    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    owner = _Owner(module)
    gm = fx.GraphModule(owner, Tracer().trace(owner))
    x, call, _ = gm.graph.nodes
    effects = Effects(gm.graph)
    assert effects.is_pure(call) == (not (is_random or writes_input or writes_state))
    assert effects.is_random(call) is is_random
    assert (effects.memory_of(x) <= effects.writes(call)) is writes_input
    assert bool(effects.writes(call) - effects.memory_of(x) - {call}) is writes_state
