"""Calls: is a call pure, what does it write to, and which arguments may its result be a view of.

Each question is answered from the call alone:

    F.dropout(x, 0.5, True)      pure: no, two calls draw two masks
    F.relu(x, True)              writes x: ``inplace`` is given by position
    x.reshape(-1)                returns a view of x, or a copy

A call is pure only if it is known to be: ATen operators by their tags and schema, torch functions
and tensor methods by a closed list of names. An unknown call may return a view of any of its
tensors. If it is not torch's own, it may also modify any of them.

Invariant: if an answer is wrong, it is too cautious.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx

from runlora_fx._torch_compat import is_composite
from runlora_fx.passes.read import known_calls as known

_BUILTIN_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.GetSetDescriptorType,
)


class _Schema(NamedTuple):
    """The part of an operator's schema that matters here.

    Attributes:
        names: Names of its arguments.
        written: Names of the arguments that it modifies.
        viewed: Names of the arguments that its results may be views of.
        may_view_any: True if it may return a view of any argument.
    """

    names: tuple[str, ...]
    written: frozenset[str]
    viewed: frozenset[str]
    may_view_any: bool


class Operator(NamedTuple):
    """What is known of all calls of an operator.

    Attributes:
        target: The operator.
        name: Its name, without namespace and overload.
        is_pure: True if all calls are pure; None if that depends on the arguments.
        never_writes: True if none modifies an argument.
        never_views: True if each returns new memory.
    """

    target: torch._ops.OpOverload
    name: str
    is_pure: bool | None
    never_writes: bool
    never_views: bool


#: By the identity of an operator: its own hash is a slow call of a Python method.
_operators: dict[int, Operator] = {}


def operator_facts(target: object) -> Operator | None:
    """What is known of all calls of an operator; None for functions, methods and modules."""
    found = _operators.get(id(target))
    if found is not None and found.target is target:
        return found
    if not isinstance(target, torch._ops.OpOverload):
        return None
    schema, name = _schema(target), name_of(target)
    never_writes = not schema.written and name not in known.UPDATES_STATISTICS
    is_settled = never_writes and name not in known.DROPOUTS
    found = _operators[id(target)] = Operator(
        target,
        name,
        _is_pure_operator(target) if is_settled else None,
        never_writes,
        not schema.may_view_any and not schema.viewed,
    )
    return found


# --- pure, random


def is_pure(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if two such calls on equal arguments return equal tensors and have no other effect.

    Args:
        target: An operator, a function, or the name of a tensor method.
        args: Positional arguments; tensors are nodes.
        kwargs: Keyword arguments.
    """
    facts = operator_facts(target)
    if facts is not None and facts.is_pure is not None:
        return facts.is_pure
    if any(True for _ in written_arguments(target, args, kwargs)):
        return False
    name = name_of(target)
    if name in known.DROPOUTS and _origin(target) == "torch":
        return not _drops(target, args, kwargs)
    if isinstance(target, torch._ops.OpOverload):
        return _is_pure_operator(target)
    return _origin(target) == "torch" and (
        name in known.PURE_AND_FRESH or name in known.PURE_AND_VIEWS
    )


@cache
def _is_pure_operator(operator: torch._ops.OpOverload) -> bool:
    """True if calls of an operator that modify no argument are pure."""
    is_random = torch.Tag.nondeterministic_seeded in operator.tags
    is_trusted = operator.namespace in known.TRUSTED_NAMESPACES
    return is_trusted and not is_random and name_of(operator) not in known.UNINITIALISED


def is_random(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if two such calls may return different tensors for equal arguments.

    True for functions that are not torch's own. Operators of any library are judged by their tags.
    """
    name = name_of(target)
    if name in known.DROPOUTS and _origin(target) == "torch":
        return _drops(target, args, kwargs)
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags or name in known.UNINITIALISED
    if _origin(target) != "torch":
        return True
    return name in known.RANDOM or name in known.UNINITIALISED or _is_tagged_random(name)


@cache
def _is_tagged_random(name: str) -> bool:
    """True if an ATen operator of this name is random."""
    overloads = _overloads(getattr(torch.ops.aten, name, None))
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def _drops(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """True if dropout may drop anything."""
    given = {**dict(zip(("input", "p", "training"), args, strict=False)), **kwargs}
    training = given.get("training", given.get("train", True))
    p = given.get("p", 0.5)
    return not (training is False or (isinstance(p, int | float) and p == 0))


# --- writes


def written_arguments(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Any]:
    """The arguments that a call modifies: nodes, or lists of nodes."""
    if isinstance(target, torch._ops.OpOverload):
        schema = _schema(target)
        yield from _named(schema.names, schema.written, args, kwargs)
        if name_of(target) in known.UPDATES_STATISTICS:
            yield from _statistics(schema.names, args, kwargs)
        return
    name, origin = name_of(target), _origin(target)
    if origin == "foreign":
        yield from (*args, *kwargs.values())
        return
    names = _parameters(target)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if given.get("out") is not None:
        yield given["out"]
    if name in known.UPDATES_STATISTICS:
        yield from _statistics(names, args, kwargs)
    if name in ("embedding", "embedding_bag") and given.get("max_norm") is not None:
        yield given.get("weight")
    if _is_true(given.get("inplace", False)) or _is_in_place(target, name):
        yield from _modified(name, args, kwargs)


def _modified(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """What an in-place function modifies: the arguments that ATen's schema names, or the first."""
    overloads = _overloads(getattr(torch.ops.aten, name, None)) if name.endswith("_") else ()
    found = False
    for overload in overloads:
        schema = _schema(overload)
        for value in _named(schema.names, schema.written, args, kwargs):
            found = True
            yield value
    if not found:
        yield from args[:1] or tuple(kwargs.values())


def _is_in_place(target: Any, name: str) -> bool:
    if getattr(target, "__module__", "") == "_operator":
        return name in known.IN_PLACE_OPERATORS
    if name in ("__setitem__", "__delitem__", "setattr", "delattr"):
        return True
    if name.startswith("__") and name.endswith("__"):
        return name[2:-2] in known.IN_PLACE_OPERATORS
    return name.endswith("_")


def _statistics(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Any]:
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # instance_norm uses the statistics of its input unless told otherwise.
    default = "use_input_stats" in names
    if any(_is_true(given.get(name, default)) for name in known.TRAINING if name in names):
        yield from (given.get(name) for name in known.STATISTICS)


def _is_true(x: Any) -> bool:
    """True if an argument may be true: a node may, because its value is not known."""
    return isinstance(x, fx.Node) or bool(x)


def _named(
    names: tuple[str, ...],
    wanted: frozenset[str],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Iterator[Any]:
    """The arguments that have some names."""
    if wanted:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        yield from (value for name, value in given.items() if name in wanted)


# --- views


def viewed_arguments(
    target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[Any]:
    """The arguments that the result may share memory with; none if the result is new memory."""
    if isinstance(target, torch._ops.OpOverload):
        schema = _schema(target)
        if schema.may_view_any:
            yield from (*args, *kwargs.values())
        else:
            yield from _named(schema.names, schema.viewed, args, kwargs)
        return
    written = list(written_arguments(target, args, kwargs))
    # The einsum of one operand may only permute it.
    is_fresh = _is_fresh(name_of(target)) or (name_of(target) == "einsum" and len(_flat(args)) > 2)
    if is_fresh and not written and _origin(target) == "torch":
        return
    yield from (*args, *kwargs.values())


def _flat(args: tuple[Any, ...]) -> list[Any]:
    nested = (x if isinstance(x, list | tuple) else (x,) for x in args)
    return [x for group in nested for x in group]


# --- operators and functions


@cache
def _schema(operator: torch._ops.OpOverload) -> _Schema:
    arguments = operator._schema.arguments
    names = tuple(argument.name for argument in arguments)
    written = frozenset(a.name for a in arguments if a.alias_info and a.alias_info.is_write)
    shared = [r.alias_info for r in operator._schema.returns if r.alias_info is not None]
    viewed = frozenset(a.name for a in arguments if a.alias_info) if shared else frozenset()
    is_declared = bool(shared) and len(shared) == len(operator._schema.returns)
    may_view_any = not is_declared and _may_view(operator)
    return _Schema(names, written, viewed, may_view_any)


def _may_view(operator: torch._ops.OpOverload) -> bool:
    """True if an operator may return a view that its schema does not declare.

    Kernels must obey the schema. Operators that are composed of others need not.
    """
    name = name_of(operator)
    if name in known.UNDECLARED_VIEWS:
        return True
    return is_composite(operator) and not (operator.namespace == "aten" and _is_fresh(name))


def _is_fresh(name: str) -> bool:
    """True if a function of torch always returns new memory: einsum may only permute."""
    return name in known.PURE_AND_FRESH and name != "einsum"


def _overloads(packet: Any) -> tuple[torch._ops.OpOverload, ...]:
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return ()
    names = packet.overloads()  # type: ignore[no-untyped-call]
    found = (getattr(packet, name) for name in names)
    # TorchScript's operators on numbers and lists are among them.
    return tuple(op for op in found if any("Tensor" in str(a.type) for a in op._schema.arguments))


@cache
def _parameters(target: Any) -> tuple[str, ...]:
    """The names of the parameters of a function that is written in Python."""
    if not isinstance(target, types.FunctionType):
        return ()
    parameters = inspect.signature(target).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind not in variadic)


def name_of(target: Any) -> str:
    """The name of an operator, function or method, without namespace and overload."""
    if isinstance(target, str):
        return target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", ""))


@cache
def _origin(target: Any) -> str:
    """Whose function it is: "torch" for torch's, Python's and tensor methods, else "foreign".

    Higher-order operators, ``autograd.Function.apply`` and what a user wraps are foreign.
    """
    if isinstance(target, str):
        return "torch"
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return "torch" if str(target).startswith(("aten.", "prims.")) else "foreign"
    module = getattr(target, "__module__", None)
    if isinstance(target, _BUILTIN_FUNCTIONS) and module in (None, "_operator", "builtins", "math"):
        return "torch"
    is_function = isinstance(target, (types.FunctionType, *_BUILTIN_FUNCTIONS))
    is_torch = module == "torch" or str(module).startswith("torch.")
    return "torch" if is_function and is_torch else "foreign"


def is_functional(target: Any) -> bool:
    """True if a higher-order operator is known to modify nothing."""
    return getattr(target, "__name__", "") in known.FUNCTIONAL


def is_foreign(target: Any) -> bool:
    """True if nothing is known about a function."""
    return _origin(target) == "foreign"
