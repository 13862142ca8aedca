"""Explain: what the backend would do with a model, before anything is bought, loaded or run.

    runlora explain meta-llama/Llama-3.1-8B --rank 16 --dropout 0.05 --device h100
    runlora explain train.py:build --json

A model is the configuration of a causal language model, by folder or name. It gets adapters on all
linear layers. Or it is what a function in a file returns: a model and its arguments. Nothing has
data, so any size fits.

Invariant: no weight is loaded or made, and nothing is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.options import Options
from runlora_fx.trace import explain

SUMMARY = "Show what the backend would do with a model of any size, without weights."

_DTYPES = ("float32", "bfloat16", "float16")


class Example(NamedTuple):
    """A model, and what it is called with."""

    model: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the model, its adapters and batch, and the options of the backend."""
    parser.add_argument(
        "model", help="folder or hub name of a language model's configuration, or FILE.py:FUNCTION"
    )
    parser.add_argument("--rank", type=int, default=16, help="rank of the adapters")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout of the adapters")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens in a sequence")
    parser.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights")
    parser.add_argument(
        "--device", default="", help=f"plan for one of {', '.join(PUBLISHED)}, or a profile's file"
    )
    parser.add_argument("--memory", default="balanced", help="policy for what is saved")
    parser.add_argument("--objective", default="time", help="what plans are ranked by")
    parser.add_argument("--inference", action="store_true", help="no gradients")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(given: argparse.Namespace) -> int:
    """Explain a model, and print the report.

    Args:
        given: The arguments.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: If an argument is not valid. The message says which are.
    """
    names = ("device", "memory", "objective")
    options = {name: getattr(given, name) for name in names}
    Options.of(options)  # rejects them before anything takes time
    for name in ("rank", "batch", "tokens"):
        if getattr(given, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(given, name)}")
    if not 0 <= given.dropout < 1:
        raise ValueError(f"--dropout must be in [0, 1), got {given.dropout}")
    # Progress goes to the terminal alone, so that a report can be piped.
    with Console(stderr=True).status("Tracing and planning ..."):
        file, _, function = given.model.partition(":")
        is_file = file.endswith(".py")
        made = _from_file(Path(file), function) if is_file else _language_model(given)
        with torch.set_grad_enabled(not given.inference):
            report = explain(made.model, *made.args, **made.kwargs, **options)
    print(report.to_json(indent=1) if given.json else report)
    return 0


def _from_file(file: Path, function: str) -> Example:
    """What a function in a file returns, made on the meta device.

    Raises:
        ValueError: If there is no such function, or it returns something else.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    build = getattr(module, function or "build", None)
    if not callable(build):
        raise ValueError(f"{file} has no function {function or 'build'!r}; name one as {file}:NAME")
    with torch.device("meta"):
        made = build()
    parts = made if isinstance(made, tuple) else (made,)
    is_one = (
        2 <= len(parts) <= 3
        and callable(parts[0])
        and isinstance(parts[1], Sequence)
        and all(isinstance(part, Mapping) for part in parts[2:])
    )
    if not is_one:
        raise ValueError(
            f"{function or 'build'}() must return (model, arguments) or (model, arguments, keyword "
            f"arguments), where arguments is a tuple"
        )
    return Example(*parts)


def _language_model(given: argparse.Namespace) -> Example:
    """A causal language model with adapters and a batch of tokens, on the meta device.

    Raises:
        ValueError: If its configuration cannot be loaded.
        SystemExit: If PEFT or Transformers is missing.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        message = "explain needs PEFT and Transformers: pip install 'runlora-fx[demo]'"
        raise SystemExit(f"{message} ({error})") from None
    try:
        config = transformers.AutoConfig.from_pretrained(given.model)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot load the configuration of {given.model!r}: {error}") from None
    config.use_cache = False
    lora = peft.LoraConfig(
        r=given.rank, lora_dropout=given.dropout, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with torch.device("meta"), _default_dtype(getattr(torch, given.dtype)):
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
        tokens = torch.empty(given.batch, given.tokens, dtype=torch.long)
    model.train(not given.inference)
    labels = {} if given.inference else {"labels": tokens}
    return Example(model, (), {"input_ids": tokens, **labels})


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """A context with another default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
