"""Command line: `runlora <command>`, or `python -m runlora_fx <command>`.

Example: `runlora demo --rank 8` runs ``cli/demo.py``.

Invariant: an invalid option ends in a message and a nonzero exit status, not in a traceback.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from runlora_fx.cli import calibrate, demo, explain
from runlora_fx.cli.demo_training import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of this process if None.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="runlora",
        description="LoRA layers in their cheapest order, as a torch.compile backend.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in (("demo", demo), ("calibrate", calibrate), ("explain", explain)):
        added = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        command.add_arguments(added)
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "calibrate":
            return calibrate.run(arguments)
        if arguments.command == "explain":
            return explain.run(arguments)
        settings = Settings.from_arguments(arguments)
    except ValueError as error:
        parser.error(str(error))
    return demo.run(settings)


if __name__ == "__main__":
    raise SystemExit(main())
