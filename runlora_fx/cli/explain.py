"""Explain: what the backend would do with a model, before anything is bought, loaded or run.

    runlora explain meta-llama/Llama-3.1-8B --rank 16 --dropout 0.05 --device h100
    runlora explain train.py:build --json

A model is the configuration of a causal language model, by folder or name. It gets adapters on all
linear layers. Or it is what a function in a file returns: a model and its arguments. Nothing has
data, so any size fits.

Invariant: no weight is loaded or made, and nothing is measured.
"""

from __future__ import annotations

import importlib.util
import socket
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch

from runlora_fx.cli.console import quietly, status
from runlora_fx.cli.without_weights import META, on_meta
from runlora_fx.options import Options
from runlora_fx.trace import explain

#: How long to wait for the hub's first answer [s].
_HUB_TIMEOUT_S = 3.0


class Example(NamedTuple):
    """A model, and what it is called with."""

    model: Callable[..., Any]
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Question:
    """What is to be explained.

    Attributes:
        model: Folder or hub name of a configuration, or ``FILE.py:FUNCTION``.
        rank: Of the adapters.
        dropout: Of the adapters.
        batch: Sequences in a batch.
        tokens: Of each sequence.
        dtype: Of the weights, as torch names it.
        device: The option ``runlora.device``.
        memory: The option ``runlora.memory``.
        objective: The option ``runlora.objective``.
        is_inference: True for no gradients.
    """

    model: str
    rank: int = 16
    dropout: float = 0.0
    batch: int = 4
    tokens: int = 2048
    dtype: str = "bfloat16"
    device: str = ""
    memory: str = "balanced"
    objective: str = "time"
    is_inference: bool = False

    def __post_init__(self) -> None:
        Options.of(self.options)
        for name in ("rank", "batch", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout must be in [0, 1), got {self.dropout}")

    @property
    def options(self) -> dict[str, str]:
        """The options of the backend."""
        return {name: getattr(self, name) for name in ("device", "memory", "objective")}


def run(question: Question, *, as_json: bool, html: Path | None = None) -> int:
    """Explain a model, and print the report.

    Args:
        question: The model and the options.
        as_json: True to print JSON.
        html: The file to write the report to as a web page; none if None.

    Returns:
        The exit status: 0.

    Raises:
        ValueError: If an argument is not valid. The message says which are.
    """
    if html is not None and not html.absolute().parent.is_dir():
        raise ValueError(f"--html {html}: there is no folder {html.absolute().parent}")
    with status("Tracing and planning ..."), warnings.catch_warnings():
        # Dynamo reads every attribute of a model, including deprecated ones.
        warnings.simplefilter("ignore", FutureWarning)
        file, _, function = question.model.partition(":")
        is_file = file.endswith(".py")
        made = _from_file(Path(file), function) if is_file else _language_model(question)
        with torch.set_grad_enabled(not question.is_inference):
            report = explain(made.model, *made.args, **made.kwargs, **question.options)
    print(report.to_json(indent=1) if as_json else report)
    if html is not None:
        html.write_text(report.to_html(), encoding="utf-8")
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
    with META:
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


def _language_model(question: Question) -> Example:
    """A causal language model with adapters and a batch of tokens, on the meta device.

    Raises:
        ValueError: If its configuration cannot be loaded.
        SystemExit: If PEFT or Transformers is missing.
    """
    try:
        with quietly():
            import peft
            import transformers
    except ImportError as error:
        message = "explain needs PEFT and Transformers: pip install 'runlora-fx[demo]'"
        raise SystemExit(f"{message} ({error})") from None
    config = _configuration(question.model)
    config.use_cache = False
    lora = peft.LoraConfig(
        r=question.rank,
        lora_dropout=question.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with on_meta(getattr(torch, question.dtype)):
        base = transformers.AutoModelForCausalLM.from_config(config)
        model = peft.get_peft_model(base, lora, autocast_adapter_dtype=False)
        tokens = torch.empty(question.batch, question.tokens, dtype=torch.long)
    model.train(not question.is_inference)
    labels = {} if question.is_inference else {"labels": tokens}
    return Example(model, (), {"input_ids": tokens, **labels})


def _configuration(name: str) -> Any:
    """The configuration of a language model.

    Raises:
        ValueError: If it cannot be loaded.
    """
    import transformers

    try:
        is_folder = Path(name).is_dir()
        return transformers.AutoConfig.from_pretrained(
            name, local_files_only=is_folder or not _reaches_hub()
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot load the configuration of {name!r}. Give a folder with a config.json, the "
            f"name of a model on the Hugging Face hub (which needs a network), or "
            f"FILE.py:FUNCTION. Transformers says: {first}"
        ) from None


def _reaches_hub() -> bool:
    """True if the hub answers. Without this question, its client tries for half a minute."""
    from huggingface_hub import constants

    if getproxies():  # the client may get through where we do not
        return True
    url = urlsplit(constants.ENDPOINT)
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_HUB_TIMEOUT_S).close()
    except OSError:
        return False
    return True
