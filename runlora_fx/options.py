"""Options of the pass, validated when an object is made.

``{"runlora.memory": "low"}`` -> ``Options(memory="low")``.

Invariant: an :class:`Options` object is valid.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, get_args

from runlora_fx.cost_model.objective import ObjectiveName
from runlora_fx.cost_model.published import profiles_of

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
    """The options of the pass; ``torch.compile`` takes them as ``runlora.NAME``.

    Attributes:
        strict: Raise an error where the pass would otherwise warn and leave the graph unchanged.
        objective: ``"time"`` minimises the time predicted for the machine; ``"flops"`` the FLOPs
            of matrix products, ties broken by bytes moved.
        margin: The share of a region's price that a plan must save to replace it, in [0, 1).
        tune: The source of predicted times. ``"off"``: the device's properties. ``"profile"``:
            earlier measurements; if there are none, ``torch.compile`` measures a few rates once.
            ``"shapes"``: also the products of this model, measured while compiling. ``"plans"``:
            also the best few plans of each region, compiled and timed together with the pointwise
            operations around them.
        memory: ``"balanced"`` never saves more for the backward than Inductor would. ``"low"``
            saves less, and recomputes what is cheap: ``X A'`` and the masks of dropout.
            ``"fast"`` may save merged weights.
        reuse: True if ``"fast"`` may keep merged weights between calls until a weight changes.
        numerics: ``"default"`` reassociates products and sums. ``"strict"`` adds no rounding to
            that of the model in dtypes of less than 32 bits. ``"relaxed"`` also reorders across
            casts between floating-point dtypes.
        upcast: True if Inductor may compute products of 16-bit matrices in float32, where that was
            measured to be faster, as on a CPU without instructions for them. ``numerics="strict"``
            forbids it.
        memory_budget: What ``"fast"`` may save in one graph beyond ``"balanced"`` [B].
        device: The device to plan for, wherever the graph is compiled: a name such as ``"h100"``
            (rates that its maker publishes), or a file that ``calibrate --export`` wrote. Empty for
            the device that the graph runs on.
    """

    strict: bool = False
    objective: ObjectiveName = "time"
    margin: float = 0.0
    tune: TuneName = "profile"
    memory: MemoryName = "balanced"
    memory_budget: int = 0
    reuse: bool = False
    numerics: NumericsName = "default"
    upcast: bool = True
    device: str = ""

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: If one is not valid. The message says which values are.
        """
        for name in ("strict", "reuse", "upcast"):
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
                "runlora.memory='fast' and a positive runlora.memory_budget need each other; "
                f"got memory={self.memory!r} and memory_budget={budget!r}"
            )
        if self.reuse and self.memory != "fast":
            raise ValueError(f"runlora.reuse=True needs runlora.memory='fast', not {self.memory!r}")
        self._check_device()
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if not number or not 0 <= self.margin < 1:
            raise ValueError(f"runlora.margin must be a number in [0, 1), not {self.margin!r}")

    def _check_device(self) -> None:
        """Check the device to plan for."""
        if self.device == "":
            return
        try:
            profiles_of(self.device)
        except ValueError as error:
            raise ValueError(f"runlora.device {error}") from error
        if self.tune in ("shapes", "plans"):
            raise ValueError(
                "runlora.tune must be 'off' or 'profile' with runlora.device, for nothing can be "
                f"measured on it; not {self.tune!r}"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any], prefix: str = "") -> Options:
        """Options from a mapping of names to values.

        Raises:
            ValueError: If a name is unknown or a value is not valid. The message says which are.
        """
        names = [field.name for field in fields(cls)]
        for key in given:
            if key not in names:
                close = get_close_matches(key, names, 1)
                hint = f" Did you mean {prefix}{close[0]!s}?" if close else ""
                valid = ", ".join(prefix + name for name in names)
                raise ValueError(f"unknown option {prefix}{key}.{hint} Valid options: {valid}")
        return replace(cls(), **given)


def split_options(
    options: Mapping[str, Any] | None, compilers: Iterable[str] = ()
) -> tuple[Options, dict[str, Any]]:
    """Split the options of ``torch.compile`` into ours and those of the compiler.

    Args:
        options: Both kinds.
        compilers: The names of the compiler's options.

    Raises:
        ValueError: If a name is neither ours nor the compiler's, or if a value of ours is not
            valid.
    """
    given = options or {}
    ours = {k.removeprefix(PREFIX): v for k, v in given.items() if k.startswith(PREFIX)}
    others = {k: v for k, v in given.items() if not k.startswith(PREFIX)}
    known = list(compilers)
    for key in others:
        if key.replace("-", "_") not in known:
            raise ValueError(_unknown(key, known))
    return Options.of(ours, PREFIX), others


def _unknown(key: str, known: Sequence[str]) -> str:
    """What to say of a name that is neither ours nor the compiler's."""
    names = [field.name for field in fields(Options)]
    # Written without the prefix, or with another sign behind it.
    bare = re.sub(r"^runlora[^a-z]?", "", key, flags=re.IGNORECASE)
    close = get_close_matches(bare, [*names, *(known if bare == key else ())], 1)
    meant = PREFIX + close[0] if close and close[0] in names else "".join(close)
    hint = f" Did you mean {meant}?" if meant else ""
    ours = ", ".join(PREFIX + name for name in names)
    return (
        f"unknown option {key}.{hint} Options of runlora: {ours}; "
        f"torch._inductor.list_options() lists those of Inductor"
    )
