"""What a machine can do: the coefficients that turn a cost into seconds."""

from __future__ import annotations

from dataclasses import dataclass

from runlora_fx.cost_model.cost import Cost


@dataclass(frozen=True)
class MachineProfile:
    """Sustained rates of one device for one dtype.

    Attributes:
        flops_per_s: Rate of a large matrix product [FLOP/s].
        bytes_per_s: Memory bandwidth [B/s].
        launch_s: Fixed cost of a kernel [s].
    """

    flops_per_s: float = 1.5e11
    bytes_per_s: float = 1.5e10
    launch_s: float = 3e-6

    def seconds(self, cost: Cost) -> float:
        """The predicted time of an operation: its roofline and its launches [s]."""
        return (
            max(float(cost.flops) / self.flops_per_s, float(cost.bytes) / self.bytes_per_s)
            + float(cost.kernels) * self.launch_s
        )


#: A few cores of a current CPU in fp32; a ratio of FLOPs to bytes that most machines resemble.
DEFAULT_PROFILE = MachineProfile()
