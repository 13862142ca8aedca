"""The commands and their options, and nothing else: what each does is in a module of its own.

    runlora explain meta-llama/Llama-3.1-8B --rank 16 --device h100

A command imports its module when it runs. So help and completion start without torch.

Invariant: a value that is not valid ends in :class:`typer.BadParameter`, which says what is valid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from runlora_fx import __version__
from runlora_fx.cli.console import status
from runlora_fx.cost_model.objective import ObjectiveName
from runlora_fx.cost_model.published import PUBLISHED
from runlora_fx.options import MemoryName

#: The dtypes of a model that is explained, and of the demo.
HalfOrSingle: TypeAlias = Literal["float32", "bfloat16", "float16"]
Trained: TypeAlias = Literal["float32", "bfloat16"]
Precision: TypeAlias = Literal["highest", "high", "medium"]


class Measured(str, Enum):
    """The dtypes that can be measured. typer has lists of enumerations, but none of literals."""

    FLOAT64 = "float64"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


app = typer.Typer(
    help="LoRA layers in their cheapest order, as a torch.compile backend.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

#: What a terminal shows while torch is imported.
_STARTING = "Starting ..."

_DEVICE = (
    f"plan for one of {', '.join(PUBLISHED)}, or for the profile in a file that `runlora "
    "calibrate --export` wrote; this machine if not given"
)

Device: TypeAlias = Annotated[str, typer.Option(help=_DEVICE, show_default=False)]
Json: TypeAlias = Annotated[bool, typer.Option("--json", help="print JSON, for programs")]
Rank: TypeAlias = Annotated[int, typer.Option(help="rank of the adapters")]
Dropout: TypeAlias = Annotated[float, typer.Option(help="dropout of the adapters")]
Batch: TypeAlias = Annotated[int, typer.Option(help="sequences in a batch")]


def choices_of(error: Any) -> str:
    """The commands or options that an error of usage is about; empty if it is about a value."""
    context = getattr(error, "ctx", None)
    command = context.command if context is not None else typer.main.get_command(app)
    if hasattr(command, "commands"):
        return f"Commands: {', '.join(command.commands)}"
    if not hasattr(error, "possibilities"):
        return ""
    options = [opt for p in command.params for opt in p.opts if opt.startswith("--")]
    return f"Options: {', '.join(options)}"


@contextmanager
def _refused() -> Iterator[None]:
    """A context in which a :class:`ValueError` is about what the user gave."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"runlora-fx {__version__}")
        raise typer.Exit()


@app.callback()
def runlora(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """LoRA layers in their cheapest order, as a torch.compile backend."""


@app.command(help="Show what the backend would do with a model of any size, without weights.")
def explain(
    model: Annotated[
        str,
        typer.Argument(
            help="folder or hub name of a language model's configuration, or FILE.py:FUNCTION"
        ),
    ],
    rank: Rank = 16,
    dropout: Dropout = 0.0,
    batch: Batch = 4,
    tokens: Annotated[int, typer.Option(help="tokens in a sequence")] = 2048,
    dtype: Annotated[HalfOrSingle, typer.Option(help="dtype of the weights")] = "bfloat16",
    device: Device = "",
    memory: Annotated[
        MemoryName, typer.Option(help="policy for what is saved for the backward")
    ] = "balanced",
    objective: Annotated[ObjectiveName, typer.Option(help="what plans are ranked by")] = "time",
    inference: Annotated[bool, typer.Option("--inference", help="no gradients")] = False,
    json: Json = False,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="write the report as a web page as well")
    ] = None,
) -> None:
    """See ``cli/explain.py``."""
    with status(_STARTING):
        from runlora_fx.cli.explain import Question, run

    with _refused():
        question = Question(
            model, rank, dropout, batch, tokens, dtype, device, memory, objective, inference
        )
        raise typer.Exit(run(question, as_json=json, html=html))


@app.command(help="Show which plan wins for one LoRA layer, over tokens and rank.")
def crossover(
    inputs: Annotated[int, typer.Option("--in", help="inputs of the layer")] = 4096,
    outputs: Annotated[int, typer.Option("--out", help="outputs of the layer")] = 4096,
    rank: Annotated[int, typer.Option(help="the rank that formulas are filled in for")] = 16,
    dtype: Annotated[HalfOrSingle, typer.Option(help="dtype of the layer")] = "bfloat16",
    device: Device = "",
    tokens_max: Annotated[int, typer.Option(help="the most tokens of a step")] = 32768,
    memory: Annotated[
        Literal["balanced", "low"], typer.Option(help="policy for what is saved for the backward")
    ] = "balanced",
    measure: Annotated[
        bool, typer.Option("--measure", help="time the products of the plans on this machine, too")
    ] = False,
    save: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="draw the fields into a file: .png, .svg or .pdf"),
    ] = None,
    json: Json = False,
) -> None:
    """See ``cli/crossover/``."""
    with status(_STARTING):
        from runlora_fx.cli.crossover.command import run
        from runlora_fx.cli.crossover.fields import Layer

    with _refused():
        layer = Layer(inputs, outputs, dtype)
        raise typer.Exit(
            run(layer, rank, device, tokens_max, memory, measure=measure, save=save, as_json=json)
        )


@app.command(help="Predict what typical recipes gain on this machine or on a named device.")
def gain(
    device: Device = "",
    layer: Annotated[
        Literal["Llama-3-8B", "SmolLM2-135M"] | None,
        typer.Option(help="the model that the layer is of; both if not given", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """See ``cli/gain.py``."""
    with status(_STARTING):
        from runlora_fx.cli.gain import run

    with _refused():
        raise typer.Exit(run(device, layer, as_json=json))


@app.command(help="Measure this machine, so that plans are chosen by its own times.")
def calibrate(
    more: Annotated[list[Measured] | None, typer.Argument(hidden=True)] = None,
    device: Annotated[
        str,
        typer.Option(
            help="the device to measure, such as cpu or cuda:0; the fastest if not given",
            show_default=False,
        ),
    ] = "",
    dtype: Annotated[
        list[Measured] | None,
        typer.Option(
            help="a dtype to measure; several may follow",
            show_default="float32 bfloat16",
        ),
    ] = None,
    matmul_precision: Annotated[
        Precision,
        typer.Option(help="setting of torch.set_float32_matmul_precision that the profile is for"),
    ] = "highest",
    seconds: Annotated[float, typer.Option(help="the time after which measuring stops")] = 45.0,
    export: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write the profile into a file as well: with the option `runlora.device` another "
            "machine plans by it",
        ),
    ] = None,
) -> None:
    """See ``cli/calibrate.py``."""
    with status(_STARTING):
        from runlora_fx.cli.calibrate import run

    if more and not dtype:
        raise typer.BadParameter(f"write --dtype before {more[0].value}")
    given = [one.value for one in (*(dtype or ()), *(more or ()))]
    dtypes = list(dict.fromkeys(given)) or ["float32", "bfloat16"]
    with _refused():
        raise typer.Exit(run(device, dtypes, matmul_precision, seconds, export))


@app.command(help="Fine-tune a small LoRA model three ways and compare losses, time and memory.")
def demo(
    model: Annotated[
        str | None,
        typer.Option(
            help="path or hub name of a causal language model; a small random Llama if not given",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[Trained, typer.Option(help="dtype of the weights")] = "float32",
    rank: Rank = 32,
    batch: Batch = 4,
    seq: Annotated[int, typer.Option(help="tokens in a sequence")] = 256,
    dropout: Dropout = 0.0,
    steps: Annotated[int, typer.Option(help="optimizer steps of each variant")] = 30,
) -> None:
    """See ``cli/demo.py``."""
    with status(_STARTING):
        from runlora_fx.cli.demo import run
        from runlora_fx.cli.demo_training import Settings

    with _refused():
        settings = Settings(model, rank, batch, seq, dtype, dropout, steps)
    raise typer.Exit(run(settings))


@app.command(help="Check the installation, the compiler, caches and profiles of this machine.")
def doctor(
    compiles: Annotated[
        bool,
        typer.Option("--compile", help="also compile a layer with Inductor, which takes a while"),
    ] = False,
    json: Json = False,
) -> None:
    """See ``cli/doctor/``."""
    from runlora_fx.cli.doctor.command import run

    raise typer.Exit(run(compiles=compiles, as_json=json))
