"""Make the screens of docs/commands.md: run every command in a terminal, and write what it shows.

    python docs/make_screens.py [COMMAND ...]

writes `docs/screens/COMMAND.txt`, an SVG in colour where that says more, and the parts of
`docs/commands.md` that are marked: the tables of options, and the screens. ``calibrate`` and
``demo`` measure times, so their screens are made on a machine that does nothing else.

Invariant: every screen is what the command printed, with other names of folders.
"""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from runlora_fx.cli.app import app

DOCS = Path(__file__).parent

#: The width of the terminal [characters].
WIDTH = 112

#: By command, the arguments of its screen.
SCREENS = {
    "explain": "explain llama-3-8b-2-layers --device h100 --dropout 0.05",
    "crossover": "crossover --in 4096 --out 4096 --rank 16 --device h100",
    "gain": "gain --device h100",
    "calibrate": "calibrate --seconds 240 --dtype float32",
    "demo": "demo",
    "doctor": "doctor",
}

#: The screens whose colours say something.
COLOURED = ("crossover",)

#: Two layers of a Llama-3-8B, for `explain`.
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def main() -> None:
    """Make the screens that are asked for, and update the page."""
    for name in sys.argv[1:] or SCREENS:
        shown = shown_by(SCREENS[name])
        text = "\n".join(line.rstrip() for line in shown.plain.splitlines()).strip("\n")
        (DOCS / "screens" / f"{name}.txt").write_text(
            f"$ runlora {SCREENS[name]}\n{text}\n", encoding="utf-8"
        )
        if name in COLOURED:
            console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115
            console.print(shown)
            console.save_svg(str(DOCS / "screens" / f"{name}.svg"), title=f"runlora {name}")
    page = DOCS / "commands.md"
    page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")


def shown_by(arguments: str) -> Text:
    """What a command prints to a terminal, with its colours."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "llama-3-8b-2-layers")
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
        caches = {"RUNLORA_CACHE_DIR": "runlora-fx", "TORCHINDUCTOR_CACHE_DIR": "torchinductor"}
        places = {name: str(Path(folder, of)) for name, of in caches.items()}
        path = f"{DOCS.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, **places, "COLUMNS": str(WIDTH), "PYTHONPATH": path}
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "runlora_fx", *arguments.split()],
            env={**environment, "TERM": "xterm-256color"},
            cwd=folder,
            stdout=theirs,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs)
        found = b""
        while chunk := _read(ours):
            found += chunk
        os.close(ours)
        process.wait()
        text = found.decode().replace("\r\n", "\n").replace(folder, "/home/you/.cache")
    return Text.from_ansi(text)


def _read(file: int) -> bytes:
    """The next bytes of a terminal; nothing at its end."""
    try:
        return os.read(file, 1 << 16)
    except OSError:  # how a terminal ends on Linux
        return b""


def updated(page: str) -> str:
    """The page with the marked parts as they are now."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        screen = (DOCS / "screens" / f"{name}.txt").read_text(encoding="utf-8")
        page = _filled(page, f"options: {name}", options_table(command))
        page = _filled(page, f"screen: {name}", f"```text\n{screen}```")
    return page


def options_table(command: Any) -> str:
    """The options of a command as Markdown."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        names = [name for name in parameter.opts if name.startswith("--") and name != "--help"]
        for name in names:
            shown = parameter.show_default
            default = shown if isinstance(shown, str) else parameter.default
            value = f"`{default}`" if default not in (None, "", False) else ""
            lines.append(f"| `{name}` | {value} | {parameter.help} |")
    return "\n".join(lines)


def _filled(page: str, mark: str, content: str) -> str:
    """The page with another content between a mark and the next end."""
    pattern = rf"(<!-- {re.escape(mark)} -->\n).*?(\n<!-- end -->)"
    filled, count = re.subn(
        pattern, lambda found: f"{found[1]}{content}{found[2]}", page, flags=re.DOTALL
    )
    assert count == 1, f"docs/commands.md has no mark {mark!r}"
    return filled


if __name__ == "__main__":
    main()
