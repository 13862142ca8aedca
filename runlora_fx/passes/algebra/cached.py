"""Cached properties: computed when first asked for, and then attributes of their object.

    Polynomial.T      ->      computed once for each polynomial

Before Python 3.12, :func:`functools.cached_property` takes a lock for each object. Polynomials are
small, and there are many.

Invariant: the property of an object never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

_T = TypeVar("_T")


class cached(Generic[_T]):
    """A property that is computed once for each object."""

    def __init__(self, compute: Callable[[Any], _T]) -> None:
        """Compute it by a method of the object."""
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: Any = None) -> cached[_T]: ...

    @overload
    def __get__(self, instance: object, owner: Any = None) -> _T: ...

    def __get__(self, instance: object | None, owner: Any = None) -> cached[_T] | _T:
        """The property of an object; later its attribute is found first."""
        if instance is None:
            return self
        found = instance.__dict__[self._name] = self._compute(instance)
        return found
