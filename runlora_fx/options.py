"""The options of the pass, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, get_args

from runlora_fx.cost_model.objective import ObjectiveName

TuneName: TypeAlias = Literal["off", "profile", "shapes", "plans"]

NumericsName: TypeAlias = Literal["default", "strict", "relaxed"]
MemoryName: TypeAlias = Literal["balanced", "low", "fast"]

_CHOICES = (
    ("objective", ObjectiveName),
    ("tune", TuneName),
    ("memory", MemoryName),
    ("numerics", NumericsName),
)

#: Prefix of our keys among the options of ``torch.compile``.
PREFIX = "runlora."


@dataclass(frozen=True)
class Options:
    """What can be asked of the pass; as ``torch.compile`` options the keys are ``runlora.NAME``.

    Attributes:
        strict: Raise where the pass would otherwise warn and leave the graph as it came.
        objective: ``"time"`` minimises the time predicted for the machine; ``"flops"`` the FLOPs
            of matrix products, ties broken by bytes moved.
        margin: The share of a region's price that a plan has to save to be taken, in [0, 1).
        tune: What the times are predicted from: ``"off"`` the device's properties; ``"profile"``
            what was measured before, where something was; ``"shapes"`` the products of this model,
            measured now where they were not before; ``"plans"`` also the best few plans of each
            region, compiled and timed with the pointwise operations around them.
        memory: ``"balanced"`` never holds more for the backward than Inductor would; ``"low"``
            holds less where it is cheap to compute again: ``X A'`` and the masks of dropout;
            ``"fast"`` may hold merged weights.
        reuse: Whether ``"fast"`` may keep merged weights from call to call, until a weight changes.
        numerics: ``"default"`` reassociates products and sums; ``"strict"`` adds no rounding that
            the model does not have, in dtypes of less than 32 bits; ``"relaxed"`` also crosses
            casts between floats.
        memory_budget: What ``"fast"`` may hold in one graph [B].
    """

    strict: bool = False
    objective: ObjectiveName = "time"
    margin: float = 0.0
    tune: TuneName = "profile"
    memory: MemoryName = "balanced"
    memory_budget: int = 0
    reuse: bool = False
    numerics: NumericsName = "default"

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: If one is not valid; the message lists what is.
        """
        for name in ("strict", "reuse"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"runlora.{name} must be True or False, not {getattr(self, name)!r}"
                )
        for name, kind in _CHOICES:
            if getattr(self, name) not in get_args(kind):
                valid = ", ".join(map(repr, get_args(kind)))
                raise ValueError(
                    f"runlora.{name} must be one of {valid}, not {getattr(self, name)!r}"
                )
        budget = self.memory_budget
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 0:
            raise ValueError(
                f"runlora.memory_budget must be a number of bytes, 0 or more, not {budget!r}"
            )
        if (self.memory == "fast") != (budget > 0):
            raise ValueError(
                "runlora.memory_budget must be given with runlora.memory='fast', and only then; "
                f"got memory={self.memory!r} and not {budget!r}"
            )
        if self.reuse and self.memory != "fast":
            raise ValueError(
                "runlora.reuse must be given with runlora.memory='fast'; "
                f"got memory={self.memory!r} and not 'fast'"
            )
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if not number or not 0 <= self.margin < 1:
            raise ValueError(f"runlora.margin must be a number in [0, 1), not {self.margin!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any], prefix: str = "") -> Options:
        """Options from a mapping of names to values.

        Raises:
            ValueError: If a name is unknown or a value is not valid; the message lists what is.
        """
        names = [field.name for field in fields(cls)]
        for key in given:
            if key not in names:
                close = get_close_matches(key, names, 1)
                hint = f" Did you mean {prefix}{close[0]!s}?" if close else ""
                valid = ", ".join(prefix + name for name in names)
                raise ValueError(f"unknown option {prefix}{key}.{hint} Valid options: {valid}")
        return replace(cls(), **given)


def split_options(options: Mapping[str, Any] | None) -> tuple[Options, dict[str, Any]]:
    """Our options and the others among those given to ``torch.compile``.

    Raises:
        ValueError: If a ``runlora.`` key is unknown or its value is not valid.
    """
    ours = {k.removeprefix(PREFIX): v for k, v in (options or {}).items() if k.startswith(PREFIX)}
    others = {k: v for k, v in (options or {}).items() if not k.startswith(PREFIX)}
    return Options.of(ours, PREFIX), others
