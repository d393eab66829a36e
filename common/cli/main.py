"""The command line: finds the command, carries it out, and turns errors into one line.

Exit status: 0 the runs agree, or one run finished and there is nothing to compare it with; 1 they
disagree; 2 the request cannot be carried out; 130 or 143 stopped, by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import contextlib
import sys

from lockstep.common.backends import BackendPackage
from lockstep.common.cli import parser
from lockstep.common.cli.parser import Invocation
from lockstep.common.errors import LockstepError, printable
from lockstep.common.system.interrupt import SignalHandler


def main(backends: BackendPackage, argv: list[str] | None = None) -> int:
    """Carry out one command line.

    Args:
        argv: without the program's name; None: `sys.argv`'s.

    Returns:
        The exit status.
    """
    arguments = sys.argv[1:] if argv is None else argv
    with SignalHandler() as signals:
        try:
            options = parser.parse(arguments)
            invocation = Invocation(arguments, backends, signals, sys.stdout)
            command = parser.command_module(options.command)
            with contextlib.redirect_stdout(
                sys.stderr if getattr(options, "json", False) else sys.stdout
            ):
                return command.execute(options, invocation)
        except LockstepError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            return 2
        except ModuleNotFoundError as error:  # one of a user's own code is a LockstepError by now
            if not error.name or error.name.startswith("lockstep"):
                raise
            print(f"error: {error.name} is not installed: pip install -e .", file=sys.stderr)
            return 2
        except KeyboardInterrupt as interruption:
            text = f"interrupted: {interruption}" if str(interruption) else "interrupted"
            print(text, file=sys.stderr)
            return signals.status()
