"""Training data of the demo: text that comes with Python, as bytes or as tokens.

Example: ``batches(corpus(), batch=4, seq=256, seed=0)`` yields tensors of shape (4, 256).

Invariant: equal seeds yield equal batches, and nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor


def corpus(tokenizer: Any = None) -> Tensor:
    """The language reference that `help()` reads, as one long line of tokens.

    Args:
        tokenizer: A Transformers tokenizer; the tokens are plain bytes (0 to 255) if None.

    Returns:
        Token numbers, shape [length], int64.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    if tokenizer is None:
        return torch.frombuffer(bytearray(text, "utf-8"), dtype=torch.uint8).long()
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"])


def batches(tokens: Tensor, batch: int, seq: int, *, seed: int) -> Iterator[Tensor]:
    """Random windows of the corpus, without end and the same for the same seed.

    Args:
        tokens: The corpus, shape [length].
        batch: Windows in a batch.
        seq: Tokens in a window.
        seed: Seed of the random choice.

    Yields:
        Token numbers, shape [batch, seq].
    """
    windows = tokens.unfold(0, seq, 1)
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield windows[torch.randint(len(windows), (batch,), generator=generator)]
