"""All substitutes, registered once, when a backend of ours is first asked for."""

from __future__ import annotations

from runlora_fx.integrations.peft_dora import make_dora_traceable
from runlora_fx.integrations.peft_experts import make_experts_traceable


def make_traceable() -> None:
    """Let Dynamo trace what it cannot trace as it stands, in our own compilations."""
    make_dora_traceable()
    make_experts_traceable()
