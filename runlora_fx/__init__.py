"""runlora-fx: LoRA training and inference in the cheapest contraction order.

``torch.compile(model, backend="runlora")`` needs no import of this package. The functions here
rewrite single graphs and explain what the backend does:

    gm = runlora_fx.rewrite(gm, example_inputs)
    print(runlora_fx.explain(model, *inputs))
"""

__version__ = "0.1.0"

from runlora_fx import _requirements as _requirements  # first: it names a torch that is too old
from runlora_fx.estimator import ProfileEstimator
from runlora_fx.history import last_report, report_of
from runlora_fx.joint_pass import RunloraPass
from runlora_fx.options import Options
from runlora_fx.report.data import Candidate, Refusal, Report, Site
from runlora_fx.runtime.kept_weights import forget_merged_weights
from runlora_fx.trace import explain, joint_graph, rewrite

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
