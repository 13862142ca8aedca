"""runlora-fx: LoRA training and inference in the cheapest contraction order.

``torch.compile(model, backend="runlora")`` needs no import of this package. The functions here
rewrite single graphs and explain what the backend does:

    gm = runlora_fx.rewrite(gm, example_inputs)
    print(runlora_fx.explain(model, *inputs))

The names are imported when they are first used. So the command line starts without torch, and it
can say what is wrong with an installation of torch. Where torch is there already, its logging
settings get to know our names at once.
"""

__version__ = "0.1.0"

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runlora_fx.estimator import ProfileEstimator
    from runlora_fx.history import last_report, report_of
    from runlora_fx.joint_pass import RunloraPass
    from runlora_fx.options import Options
    from runlora_fx.report.data import Candidate, Refusal, Report, Site
    from runlora_fx.runtime.kept_weights import forget_merged_weights
    from runlora_fx.trace import explain, joint_graph, rewrite
else:
    #: By public name, the module that has it.
    _MODULES = {
        "Candidate": "report.data",
        "Options": "options",
        "ProfileEstimator": "estimator",
        "Refusal": "report.data",
        "Report": "report.data",
        "RunloraPass": "joint_pass",
        "Site": "report.data",
        "explain": "trace",
        "forget_merged_weights": "runtime.kept_weights",
        "joint_graph": "trace",
        "last_report": "history",
        "report_of": "history",
        "rewrite": "trace",
    }

    def __getattr__(name: str) -> Any:
        """Import a public name."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        _prepare()
        found = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = found
        return found

    def _prepare() -> None:
        """Name a torch that is too old; have ``TORCH_LOGS`` take our names."""
        import_module(f"{__name__}._requirements")
        import_module(f"{__name__}._torch_debug")

    def __dir__() -> list[str]:
        """The names of the module, those that are not imported yet too."""
        return sorted({*globals(), *_MODULES})

    if sys.modules.get("torch") is not None:
        _prepare()


__all__ = [
    "Candidate",
    "Options",
    "ProfileEstimator",
    "Refusal",
    "Report",
    "RunloraPass",
    "Site",
    "explain",
    "forget_merged_weights",
    "joint_graph",
    "last_report",
    "report_of",
    "rewrite",
]
