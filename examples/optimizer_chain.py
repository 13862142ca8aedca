"""The step of an optimizer: long chains of small products are ordered as well.

Run it with ``python examples/optimizer_chain.py``.

LoRA-Pro (Wang et al., arXiv 2407.18242) corrects the gradients of adapters. Written from left to
right, as in the paper, it builds an (m, m) projector. In the cheapest order it does not.
"""

import torch
from flavours.lora_pro import corrected_by_sylvester

import runlora_fx


def main(m: int = 512, n: int = 384, rank: int = 8) -> None:
    """Compile the correction and compare its values with those of eager mode."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    a, b, grad_a, grad_b = random(rank, n), random(m, rank), random(rank, n), random(m, rank)
    compiled = torch.compile(corrected_by_sylvester, backend="runlora_eager", fullgraph=True)
    given = (a, b, grad_a, grad_b, 2.0)
    for value, wanted in zip(compiled(*given), corrected_by_sylvester(*given), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-9)
    report = runlora_fx.report_of(compiled)
    assert report is not None
    print(f"as written: {report.flops_before:,} FLOP of matrix products")
    print(f"compiled:   {report.flops_after:,} FLOP")
    print(report)


if __name__ == "__main__":
    main()
