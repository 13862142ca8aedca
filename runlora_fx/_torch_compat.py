"""Compatibility: all code that depends on the version of torch, and the uses of its private names.

``free_unbacked_symbols``, ``_TorchCompileInductorWrapper``, ``env.optimization_hint`` -> functions
with names and docstrings of ours.

Invariant: a new version of torch breaks this module and its neighbours of the same prefix, if any.
The private names themselves are imported in ``_torch_names.py``.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import CodeType, MethodType
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from runlora_fx import _torch_names as names
from runlora_fx._torch_names import (
    DispatchKey,
    FakeTensor,
    FakeTensorMode,
    InstructionTranslator,
    OpOverload,
    _disable_current_modes,
    _DisablePythonDispatcher,
    _DisableTorchDispatch,
    _set_throw_on_mutable_data_ptr,
    _set_warn_deprecated_on_mutable_data_ptr,
    _TorchCompileInductorWrapper,
    _TorchCompileWrapper,
    _TorchDynamoContext,
    compile_fx_graph,
    convert_frame,
    dynamo_config,
    dynamo_utils,
    functorch_config,
    get_eval_frame_callback,
    inductor_config,
    make_subclass,
    min_cut_rematerialization_partition,
    pgo,
    reset_code,
    skip_code,
)

try:
    CustomRuntimeEstimator = names.custom_graph_pass.CustomRuntimeEstimator
except AttributeError:  # an older torch

    class CustomRuntimeEstimator:  # type: ignore[no-redef]
        """What torch has no class for."""


#: Whether the partitioner takes an object that estimates runtimes. That of torch 2.13 does.
TAKES_ESTIMATORS = CustomRuntimeEstimator.__module__.startswith("torch.")

#: Metadata that fx copies from a node to the node that replaces it.
COPIED_META: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *getattr(names.fx_proxy, "_COPY_META_FIELDS", ()),
            "nn_module_stack",
            "fwd_nn_module_stack",
            "source_fn_stack",
            "fwd_source_fn_stack",
            "stack_trace",
            "seq_nr",
            "autograd_backward",
            "custom",
            "recompute",
            "ac_graph_id",
            "partitioner_tag",
        ]
    )
)

#: Arguments of ``torch.compile`` for :func:`explain`: from torch 2.13 on, its compilations do not
#: count against the recompile limit of the user's own.
APART: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

#: The settings of Inductor that hold custom passes.
_CUSTOM_PASSES = tuple(
    name
    for name in (
        *("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass"),
        *("post_grad_custom_pre_pass", "post_grad_custom_post_pass"),
    )
    if hasattr(inductor_config, name)
)


@contextmanager
def without_a_trace() -> Iterator[None]:
    """Compile models inside the block, and restore Dynamo's state afterwards.

    Dynamo forgets the sizes that it saw inside, and does not compare them with those it saw before,
    so that no size becomes symbolic. Counters are restored. Compiled code is dropped, except for
    functions that were compiled before as well (for those :data:`APART` separates the two). There
    is no limit of recompilations inside.
    """
    kept_sizes, pgo._CODE_STATE = pgo._CODE_STATE, defaultdict(pgo.CodeState)
    kept_counters = {name: counter.copy() for name, counter in dynamo_utils.counters.items()}
    breaks = len(dynamo_utils.graph_break_reasons)
    frames = convert_frame.FRAME_COUNTER
    compilations = convert_frame.FRAME_COMPILE_COUNTER.copy()
    known = {id(code()) for code in convert_frame.input_codes.seen}
    try:
        limits: dict[str, Any] = dict.fromkeys(
            ("recompile_limit", "accumulated_recompile_limit"), 1 << 30
        )
        with dynamo_config.patch(automatic_dynamic_local_pgo=False, **limits):
            yield
    finally:
        pgo._CODE_STATE = kept_sizes
        dynamo_utils.counters.clear()
        dynamo_utils.counters.update(kept_counters)
        del dynamo_utils.graph_break_reasons[breaks:]
        seen = (code() for code in convert_frame.input_codes.seen)
        for code in seen:
            if code is not None and id(code) not in known:
                reset_code(code)
        convert_frame.FRAME_COUNTER = frames
        convert_frame.FRAME_COMPILE_COUNTER.clear()
        convert_frame.FRAME_COMPILE_COUNTER.update(compilations)


def fake_mode_of(values: Iterable[object]) -> FakeTensorMode | None:
    """The fake mode of the first fake tensor; None if there is none."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def in_fake_mode(mode: FakeTensorMode | None) -> AbstractContextManager[Any]:
    """A context in which operators on fake tensors of a mode return fake tensors."""
    return nullcontext() if mode is None else mode


def is_plain_fake(value: object, mode: FakeTensorMode | None) -> bool:
    """True if a value is a plain strided fake tensor of a mode, with sizes that are numbers."""
    return (
        type(value) is FakeTensor
        and value.fake_mode is mode
        and value.layout is torch.strided
        and not value._has_symbolic_sizes_strides
        and value.constant is None
        and not (value.is_conj() or value.is_neg())
    )


def fake_like(
    known: FakeTensor, shape: tuple[int, ...], strides: tuple[int, ...], base: torch.Tensor | None
) -> FakeTensor:
    """A fake tensor of the dtype, device and mode of another one, with memory of its own.

    The constructor of fake tensors checks its arguments at length. All that it sets is copied here.

    Args:
        known: A fake tensor of known sizes that no operator has asked for more than its layout.
        shape: The sizes of the new one [elements].
        strides: Its strides [elements].
        base: What it is a view of instead, at the same offset as ``known`` is.
    """
    with _DisableTorchDispatch():
        made = torch.empty_strided(shape, strides, dtype=known.dtype, device="meta")
        if base is not None:
            made.set_(base.untyped_storage(), known.storage_offset(), shape, strides)
        fake = make_subclass(
            FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=known.fake_device
        )
    if known.fake_mode._allow_unsafe_data_ptr_access:
        _set_warn_deprecated_on_mutable_data_ptr(fake)
    else:
        _set_throw_on_mutable_data_ptr(fake)
    fake.__dict__.update(known.__dict__)
    return fake


@contextmanager
def outside_all_modes() -> Iterator[None]:
    """A context in which operators run on real tensors while a graph is being traced."""
    with _disable_current_modes(), _DisablePythonDispatcher():
        yield


def size_hint(expr: sympy.Expr, mode: FakeTensorMode | None, fallback: int) -> int:
    """The size that a symbolic dimension had during tracing [elements]; ``fallback`` if unknown."""
    env = None if mode is None else mode.shape_env
    if env is None:
        return fallback
    hint = getattr(env, "optimization_hint", None)
    if hint is not None:
        return int(hint(expr, fallback=fallback))
    value = env.size_hint(expr, allow_none=True)
    return fallback if value is None else int(value)


def guard_range(size: sympy.Expr, low: int, high: int | None, mode: FakeTensorMode | None) -> bool:
    """Add a guard: the code that is being compiled is valid for ``low <= size < high`` only.

    Returns:
        True if the guard was added. Sizes that are only known at run time cannot be guarded.
    """
    env = None if mode is None else mode.shape_env
    if env is None or free_unbacked_symbols(size):
        return False
    for bound in (size >= low, None if high is None else size < high):
        # A comparison that holds for all sizes is sympy.true: nothing to guard.
        if isinstance(bound, sympy.core.relational.Relational) and not env.evaluate_expr(bound):
            return False
    return True


def is_current(size: sympy.Expr, mode: FakeTensorMode | None) -> bool:
    """True if a symbolic size is still symbolic; a guard may have turned it into a number."""
    env = None if mode is None else mode.shape_env
    return env is None or bool(env.replace(size) == size)


def repeats_random_operators() -> bool:
    """True if the partitioner may have the backward draw other random numbers than the forward.

    It does with an activation memory budget below 1 (pytorch#190758).
    """
    return float(functorch_config.activation_memory_budget) < 1


def keeps_inputs_only() -> bool:
    """True if the partitioner keeps nothing but a graph's inputs, whatever its nodes are tagged."""
    return float(functorch_config.activation_memory_budget) == 0


def joins_in_place() -> bool:
    """True if Inductor computes a product into its place in what ``cat`` makes.

    It does not where it tunes products: then it has fixed how each result lies.
    """
    return not tunes_products()


def tunes_products(settings: Mapping[str, Any] | None = None) -> bool:
    """True if Inductor measures several implementations of each product and chooses one.

    Args:
        settings: Settings of Inductor that one compilation has of its own.
    """
    own = settings or {}
    return any(
        own.get(name, getattr(inductor_config, name))
        for name in ("max_autotune", "max_autotune_gemm")
    )


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """By operator, how Inductor has AOTAutograd compose it of others."""
    return names.select_decomp_table()


def draws_again(*, in_fours: bool) -> bool:
    """True if Inductor draws the same random numbers again in another kernel.

    It draws from seeds. But from torch 2.13 on one-dimensional kernels of some devices draw four
    numbers at a time, and those are not the numbers that kernels of more dimensions draw.

    Args:
        in_fours: True if the device is one of those.
    """
    if inductor_config.fallback_random:
        return False
    if not in_fours or getattr(inductor_config, "align_random_eager", False):
        return True
    return not hasattr(names.TritonOverrides, "_can_use_4x_random")


def partitioned(
    joint: fx.GraphModule, inputs: list[Any], forward_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The forward and the backward of a joint graph, as Inductor partitions it."""
    return min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=forward_outputs)


def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph of ATen operators with Inductor, without any custom pass."""
    compiled = compile_fx_graph(gm, inputs, options=dict.fromkeys(_CUSTOM_PASSES))
    return cast(Callable[..., Any], compiled)


@cache
def never_overwrite(operator: OpOverload) -> None:
    """Make Inductor call an operator unchanged, and never reuse the memory of its result."""
    call = names.fallback_handler(operator, add_to_fallback_set=False)  # type: ignore[no-untyped-call]

    def lowered(*args: Any) -> Any:
        result = call(*args)
        names.V.graph.never_reuse_buffers.add(result.get_name())
        return result

    names.register_lowering(operator, type_promotion_kind=None)(lowered)


def inductor_compiler(mode: str | None, options: Mapping[str, Any]) -> Any:
    """The backend that ``torch.compile(backend="inductor", mode=..., options=...)`` uses.

    Raises:
        RuntimeError: If an option is unknown or its value is not valid.
    """
    return _TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]


def is_sym_int(node: fx.Node) -> bool:
    """True if a node holds a symbolic integer."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def must_run_backward(node: fx.Node) -> bool:
    """True if AOTAutograd says that a node that writes to memory does so in the backward."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_composite(operator: OpOverload) -> bool:
    """True if an operator is composed of others, in training as well as in inference."""
    key = DispatchKey.CompositeImplicitAutograd
    return bool(operator.has_kernel_for_dispatch_key(key))


def storage_of(tensor: torch.Tensor) -> object:
    """A key that tensors have in common if they share a storage, as far as torch tells."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


#: Inductor's setting for a pass over what it compiles: an inference graph, a forward, a backward.
LATE_PASS = "post_grad_custom_pre_pass"

#: Inductor's setting for passes over joint and inference graphs. torch 2.11 takes one pass, later
#: versions also take a list.
JOINT_PASSES = "joint_custom_pre_pass"


def joint_passes(backend: Callable[..., Any]) -> tuple[Any, ...]:
    """The custom joint passes of a backend, in the order they run; none if it is not Inductor."""
    if not isinstance(backend, _TorchCompileInductorWrapper):
        return ()
    setting = backend.config.get(JOINT_PASSES, getattr(inductor_config, JOINT_PASSES))
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, list | tuple) else (setting,)


def active_backend() -> Callable[..., Any] | None:
    """The backend that Dynamo compiles for in this thread, without torch's wrappers; or None.

    While Dynamo traces, that is the backend of the graph. While compiled code runs, it is the one
    that further frames would be compiled for.
    """
    backend: Any
    try:
        backend = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is being traced
        backend = get_eval_frame_callback()
    while (inner := _wrapped_backend(backend)) is not None:
        backend = inner
    return cast("Callable[..., Any] | None", backend)


#: What ``torch.compile`` makes of a backend.
_COMPILE_CALLS = (_TorchCompileWrapper, _TorchCompileInductorWrapper)


def compiled_for() -> tuple[Any, Hashable, object] | None:
    """What Dynamo compiles for in this thread; None if it compiles nothing for ``torch.compile``.

    Returns:
        The object that one call of ``torch.compile`` has made; the code that is compiled, with each
        part after a graph break by itself; and an object that stands for this compilation.
    """
    try:
        output = InstructionTranslator.current_tx().output
        code, backend = output.root_tx.f_code, output.compiler_fn
    except AttributeError:
        return None
    owner = _call_of(backend)
    if owner is None:
        return None
    place = (code.co_filename, code.co_firstlineno, code.co_name)
    return owner, place, output


def compile_call_of(compiled: object) -> Any | None:
    """The object that ``torch.compile`` has made for what it returned; None if it is none of that.

    Args:
        compiled: A compiled module or function, or a module whose method ``compile`` was called.
    """
    inside = getattr(compiled, "_compiled_call_impl", None)
    contexts = [getattr(compiled, "dynamo_ctx", None)]
    for function in (compiled, inside):
        cells = getattr(function, "__closure__", None) or ()
        contexts += [cell.cell_contents for cell in cells]
    for context in contexts:
        if isinstance(context, _TorchDynamoContext):
            return _call_of(context.callback)
    return None


def _call_of(backend: Any) -> Any | None:
    """The object of a call of ``torch.compile`` among the wrappers of a backend."""
    while backend is not None:
        if isinstance(backend, _COMPILE_CALLS):
            return backend
        backend = _wrapped_backend(backend)
    return None


def never_compile_alone(code: CodeType) -> None:
    """Make Dynamo trace a function inside its callers only, and never as a frame of its own."""
    skip_code(code)


def _wrapped_backend(backend: Any) -> Any | None:
    """The backend inside one of torch's wrappers (debugging, options, DDP) or a ``partial``."""
    if isinstance(backend, MethodType):
        return backend.__self__
    names = ("_torchdynamo_orig_backend", "compiler_fn", "backend_compile_fn", "func")
    return next(filter(None, (getattr(backend, name, None) for name in names)), None)
