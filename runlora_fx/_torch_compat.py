"""What differs between torch 2.11 and 2.13, or may change with the next, in one place."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import CodeType, MethodType
from typing import Any, cast

import sympy
import torch
from torch import fx
from torch._C._dynamo.eval_frame import get_eval_frame_callback, reset_code
from torch._dynamo import config as dynamo_config
from torch._dynamo import convert_frame, pgo
from torch._dynamo import utils as dynamo_utils
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import proxy as _proxy
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._python_dispatch import _disable_current_modes

#: Metadata that fx itself copies when a node is made in the place of another.
COPIED_META: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *getattr(_proxy, "_COPY_META_FIELDS", ()),
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

#: Arguments of ``torch.compile`` for a look at a model: nothing of it counts against the recompile
#: limit of the user's own compilations (torch 2.13).
APART: dict[str, Any] = (
    {"isolate_recompiles": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters
    else {}
)

#: The settings of Inductor that hold passes of others.
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
    """Compile models inside, and leave Dynamo as if they had not been compiled.

    Sizes that were seen are forgotten, and they do not meet those that were seen before: no size
    becomes symbolic. Statistics are those of before. Code that was compiled for the first time is
    thrown away; other code keeps what was compiled of it before (:data:`APART` keeps it out of what
    the user compiles).
    """
    kept_sizes, pgo._CODE_STATE = pgo._CODE_STATE, defaultdict(pgo.CodeState)
    kept_counters = {name: counter.copy() for name, counter in dynamo_utils.counters.items()}
    breaks = len(dynamo_utils.graph_break_reasons)
    frames = convert_frame.FRAME_COUNTER
    compilations = convert_frame.FRAME_COMPILE_COUNTER.copy()
    known = {id(code()) for code in convert_frame.input_codes.seen}
    try:
        with dynamo_config.patch(automatic_dynamic_local_pgo=False):
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
    """The fake mode that example tensors live in."""
    for value in values:
        if isinstance(value, FakeTensor):
            return value.fake_mode
    return None


def in_fake_mode(mode: FakeTensorMode | None) -> AbstractContextManager[Any]:
    """A context in which operators on example tensors compute example tensors."""
    return nullcontext() if mode is None else mode


def is_plain_fake(value: object, mode: FakeTensorMode | None) -> bool:
    """Whether a value is a strided fake tensor of a mode, of known sizes, and nothing else."""
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
    with torch._C._DisableTorchDispatch():
        made = torch.empty_strided(shape, strides, dtype=known.dtype, device="meta")
        if base is not None:
            made.set_(base.untyped_storage(), known.storage_offset(), shape, strides)
        fake = torch.Tensor._make_subclass(
            FakeTensor, made, False, dispatch_device=True, device_for_backend_keys=known.fake_device
        )
    if known.fake_mode._allow_unsafe_data_ptr_access:
        torch._C._set_warn_deprecated_on_mutable_data_ptr(fake)
    else:
        torch._C._set_throw_on_mutable_data_ptr(fake)
    fake.__dict__.update(known.__dict__)
    return fake


@contextmanager
def outside_all_modes() -> Iterator[None]:
    """A context in which operators run on real tensors although a graph is being traced."""
    with _disable_current_modes(), torch._C._DisablePythonDispatcher():
        yield


def size_hint(expr: sympy.Expr, mode: FakeTensorMode | None, fallback: int) -> int:
    """The size that a symbolic dimension had when the graph was traced."""
    env = None if mode is None else mode.shape_env
    if env is None:
        return fallback
    hint = getattr(env, "optimization_hint", None)
    if hint is not None:
        return int(hint(expr, fallback=fallback))
    value = env.size_hint(expr, allow_none=True)
    return fallback if value is None else int(value)


def guard_range(size: sympy.Expr, low: int, high: int | None, mode: FakeTensorMode | None) -> bool:
    """Make the code that is being compiled hold for ``low <= size < high`` only.

    Returns:
        Whether a guard could be made: not of sizes that only the run knows.
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
    """Whether a symbolic size is still what it was: guards may have put a number in its place."""
    env = None if mode is None else mode.shape_env
    return env is None or bool(env.replace(size) == size)


def draws_from_seeds() -> bool:
    """Whether Inductor replaces random operators by functions of a seed."""
    return not inductor_config.fallback_random


def partitioned(
    joint: fx.GraphModule, inputs: list[Any], forward_outputs: int
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """A joint graph cut into forward and backward, as Inductor cuts it."""
    return min_cut_rematerialization_partition(joint, inputs, num_fwd_outputs=forward_outputs)


def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A graph of ATen operators, compiled by Inductor without the passes of the user or ours."""
    compiled = torch._inductor.compile(gm, inputs, options=dict.fromkeys(_CUSTOM_PASSES))
    return cast(Callable[..., Any], compiled)


def compiler_settings() -> str:
    """A digest of the settings of Inductor that the code it makes depends on, in this context.

    They are those that Inductor's own caches are keyed by, without its functions and passes.
    """
    settings = inductor_config.save_config_portable()
    plain = json.dumps(settings, sort_keys=True, default=lambda value: type(value).__qualname__)
    return hashlib.sha256(plain.encode()).hexdigest()[:24]


@cache
def never_overwrite(operator: torch._ops.OpOverload) -> None:
    """Have Inductor call an operator as it is, and never reuse the memory of its result."""
    # Imported late: it takes seconds.
    from torch._inductor.lowering import fallback_handler, register_lowering
    from torch._inductor.virtualized import V

    call = fallback_handler(operator, add_to_fallback_set=False)  # type: ignore[no-untyped-call]

    def lowered(*args: Any) -> Any:
        result = call(*args)
        V.graph.never_reuse_buffers.add(result.get_name())
        return result

    register_lowering(operator, type_promotion_kind=None)(lowered)


def inductor_compiler(mode: str | None, options: Mapping[str, Any]) -> Any:
    """What ``torch.compile(backend="inductor", mode=..., options=...)`` makes: validated options.

    Raises:
        RuntimeError: If an option is unknown or its value is not valid.
    """
    return torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]


def is_sym_int(node: fx.Node) -> bool:
    """Whether a node holds a symbolic integer."""
    return isinstance(node.meta.get("val"), torch.SymInt)


def must_run_backward(node: fx.Node) -> bool:
    """Whether AOTAutograd says that a node that writes to memory does so in the backward."""
    return node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")


def is_composite(operator: torch._ops.OpOverload) -> bool:
    """Whether an operator is composed of others, also where gradients are recorded."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return bool(operator.has_kernel_for_dispatch_key(key))


def storage_of(tensor: torch.Tensor) -> object:
    """What two tensors have in common exactly if they share memory, as far as torch tells."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


#: Inductor's setting for passes over joint and inference graphs; torch 2.11 takes one, later ones
#: also a list.
JOINT_PASSES = "joint_custom_pre_pass"


def as_passes(setting: Any) -> tuple[Any, ...]:
    """The joint passes that a value of Inductor's setting stands for, in the order they run."""
    if setting is None:
        return ()
    return tuple(setting) if isinstance(setting, list | tuple) else (setting,)


def joint_passes(backend: Callable[..., Any]) -> tuple[Any, ...]:
    """The custom passes that Inductor runs on joint graphs for a backend; none if it is another."""
    if not isinstance(backend, torch._TorchCompileInductorWrapper):
        return ()
    return as_passes(backend.config.get(JOINT_PASSES, getattr(inductor_config, JOINT_PASSES)))


def active_backend() -> Callable[..., Any] | None:
    """The backend that Dynamo compiles for in this thread, without what torch wraps it in.

    While Dynamo traces, it is the one that the graph is for; while compiled code runs, the one that
    Dynamo would compile further frames for; else None.
    """
    backend: Any
    try:
        backend = InstructionTranslator.current_tx().output.compiler_fn
    except AttributeError:  # nothing is being traced
        backend = get_eval_frame_callback()
    while (inner := _wrapped_backend(backend)) is not None:
        backend = inner
    return cast("Callable[..., Any] | None", backend)


def never_compile_alone(code: CodeType) -> None:
    """Have Dynamo run a function as it is where it is not part of a traced caller."""
    skip_code(code)


def _wrapped_backend(backend: Any) -> Any | None:
    """What a wrapper of torch (for debugging, options, DDP) or a ``partial`` calls."""
    if isinstance(backend, MethodType):
        return backend.__self__
    names = ("_torchdynamo_orig_backend", "compiler_fn", "backend_compile_fn", "func")
    return next(filter(None, (getattr(backend, name, None) for name in names)), None)
