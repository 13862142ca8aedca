"""Keywords of ``explain``: some are arguments of the model, the others are options.

``explain(model, x=x, memory="low")`` -> ``model(x=x)`` with ``Options(memory="low")``.

Invariant: a misspelt option raises an error; it is never passed on to the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from torch import nn

from runlora_fx.options import PREFIX, Options

_NAMES = [field.name for field in fields(Options)]


def split_keywords(
    model: Callable[..., Any], keywords: Mapping[str, Any]
) -> tuple[Options, dict[str, Any]]:
    """Split keywords into our options and arguments of a model.

    Args:
        model: A module or function. If one of its modules names a parameter like an option, the
            keyword is the model's; the option is then written ``runlora.NAME``.
        keywords: Both kinds.

    Raises:
        ValueError: If an option is unknown or not valid.
    """
    options, inputs = {}, {}
    named, takes_any = _parameters(model)
    for name, value in keywords.items():
        if name in named:
            inputs[name] = value
        elif name.startswith(PREFIX):
            options[name.removeprefix(PREFIX)] = value
        elif name in _NAMES or not takes_any or _is_misspelt(name, value):
            options[name] = value
        else:
            inputs[name] = value
    has_prefix = any(name.startswith(PREFIX) for name in keywords)
    return Options.of(options, PREFIX if has_prefix else ""), inputs


def _is_misspelt(name: str, value: object) -> bool:
    """True if a keyword that only ``**kwargs`` of a model takes resembles one of our options."""
    is_simple = value is None or isinstance(value, str | bool | int | float)
    return is_simple and bool(get_close_matches(name, _NAMES, 1))


def _parameters(model: Callable[..., Any]) -> tuple[set[str], bool]:
    """The names of a model's parameters, and whether it also takes ``**kwargs``.

    Wrappers such as PEFT's pass ``**kwargs`` on, so the parameters of all inner modules count.
    """
    named: set[str] = set()
    takes_any = False
    for i, signature in enumerate(_signatures(model)):
        for parameter in signature.parameters.values():
            if parameter.kind is not parameter.VAR_KEYWORD:
                named.add(parameter.name)
            elif i == 0:
                takes_any = True
        if not takes_any:
            break
    return named, takes_any


def _signatures(model: Callable[..., Any]) -> Iterator[inspect.Signature]:
    """The signatures of a function, or of a module and of those inside it."""
    functions: list[Callable[..., Any]] = [model]
    if isinstance(model, nn.Module):
        functions = [module.forward for module in model.modules()]
    for function in functions:
        try:
            yield inspect.signature(function)
        except (TypeError, ValueError):  # a builtin without one
            yield inspect.signature(lambda *args, **kwargs: None)
