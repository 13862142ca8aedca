"""Command line: `runlora <command>`, or `python -m runlora_fx <command>`.

Example: `runlora demo --rank 8` runs ``cli/demo.py``.

Invariant: an invalid option ends in a message and a nonzero exit status, not in a traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from runlora_fx.cli.app import app, choices_of

#: The base class of all errors of usage. typer exports this one subclass.
_UsageError: type[BaseException] = typer.BadParameter.__mro__[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; those of this process if None.

    Returns:
        The exit status.

    Raises:
        SystemExit: With status 2 if an argument is not valid. The message names the valid ones.
    """
    command = typer.main.get_command(app)
    given = None if argv is None else list(argv)
    try:
        status = command.main(given, prog_name="runlora", standalone_mode=False)
    except _UsageError as error:
        error.show()  # type: ignore[attr-defined]
        if choices := choices_of(error):
            print(choices, file=sys.stderr)
        raise SystemExit(2) from None
    except typer.Abort:
        return 130
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    raise SystemExit(main())
