"""A few of PyTorch's own samples, each between two low-rank layers; the sweep is a command."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("expecttest", reason="torch's samples import it")

from tests.opinfo import samples
from tests.opinfo.samples import Sample, infos, outcome_of, run_op, samples_of

OPS = (
    "mm", "addmm", "bmm", "einsum", "nn.functional.linear", "view", "expand", "index_select",
    "nn.functional.dropout",
)  # fmt: skip


@pytest.mark.parametrize("op", OPS)
def test_samples_compute_what_eager_mode_computes(op: str) -> None:
    found = list(run_op(infos()[op], "runlora_eager", 1))
    assert {f["dtype"] for f in found} == {"float32", "bfloat16"}
    assert [f for f in found if f["outcome"] not in ("right", "only rounding")] == []


def test_regions_around_samples_are_rewritten() -> None:
    """The low-rank layers are there, and the pass changes them."""
    info = infos()["nn.functional.linear"]
    given = next(s for s in samples_of(info, torch.float32, 99) if s.input.shape == (8, 8))
    sample = Sample(info, given)
    assert sample.program.before == 0 and sample.program.after
    assert outcome_of(info, given, "runlora_eager", torch.float32) == ("right", "", True)


def test_a_wrong_value_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only our backend computes wrongly is a failure, in fp64 too."""
    values = Sample.values

    def wrong(self: Any, backend: str | None, dtype: Any = None) -> list[Tensor]:
        found = values(self, None, dtype)
        return [2 * v for v in found] if backend == "runlora_eager" else found

    monkeypatch.setattr(samples.Sample, "values", wrong)
    info = infos()["mm"]
    counts = Counter(f["outcome"] for f in run_op(info, "runlora_eager", 1))
    assert counts == {"ours": 2}
