"""The drawing: the fields as an image, by matplotlib.

Before -> after: a field by FLOPs and one by time -> two panels side by side, with one legend.

Invariant: matplotlib is imported only here, and only if a drawing is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from runlora_fx.cli.crossover.contenders import Contender, winners
from runlora_fx.cli.crossover.fields import Field
from runlora_fx.cli.crossover.picture import colour

#: What matplotlib draws without a display.
_SUFFIXES = (".png", ".svg", ".pdf")


def check(path: Path) -> None:
    """Check that a drawing can be saved, before anything takes time.

    Raises:
        ValueError: If matplotlib is missing, or the path is not valid.
    """
    if find_spec("matplotlib") is None:
        raise ValueError("--save needs matplotlib: pip install 'runlora-fx[plots]'")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--save must end in one of {', '.join(_SUFFIXES)}, not {path.name!r}")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--save {path}: there is no folder {path.absolute().parent}")


def draw(fields: Sequence[Field], known: Sequence[Contender], path: Path) -> None:
    """Draw fields side by side into a file."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    letters = [contender.letter for contender in known]
    colours = ListedColormap([colour(letter) for letter in letters])
    figure = Figure(figsize=(5.5 * len(fields), 4.5), layout="constrained")
    for axes, field in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        numbers = [[letters.index(one) for one in row] for row in winners(field, known)]
        axes.imshow(
            numbers, cmap=colours, vmin=-0.5, vmax=len(letters) - 0.5, origin="lower", aspect="auto"
        )
        axes.set_xticks(range(0, len(field.tokens), 2), field.tokens[::2], rotation=45)
        axes.set_yticks(range(len(field.ranks)), field.ranks)
        axes.set_xlabel("tokens")
        axes.set_ylabel("rank")
        axes.set_title(f"{field.basis.title}\n{field.basis.source}", fontsize=9)
    patches = [
        Patch(color=colour(c.letter), label=f"{c.letter}: {c.title} ({c.variants})") for c in known
    ]
    figure.legend(handles=patches, loc="outside lower center", fontsize=8)
    layer = fields[0].layer
    figure.suptitle(f"A LoRA layer {layer.inputs} -> {layer.outputs} in {layer.dtype}, training")
    figure.savefig(path, dpi=150)
