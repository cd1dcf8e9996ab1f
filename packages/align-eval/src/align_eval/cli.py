"""The command `align-eval`, also mounted as `align eval`: reads arguments, runs a command, reports errors.

Exit status: 0 done, 1 done but results are missing, 2 an error that the user can act on (printed without a traceback),
130 interrupted.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import metadata

from align_core.contracts import Command
from align_core.errors import AlignError
from align_eval.accuracy import command as accuracy
from align_eval.mt_bench import command as mt_bench

USER_ERROR, INTERRUPTED = 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `align-eval` with the arguments after the command's name; returns the exit status."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has printed the reason, or the help
        return leaving.code if isinstance(leaving.code, int) else USER_ERROR
    try:
        status: int = arguments.run(arguments)
    except (AlignError, OSError) as error:
        sys.stderr.write(f"align-eval: error: {error}\n")
        return USER_ERROR
    except KeyboardInterrupt:
        sys.stderr.write("align-eval: interrupted; run the same command again to continue\n")
        return INTERRUPTED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align-eval", description="Evaluate models.")
    parser.add_argument("--version", action="version", version=f"align-eval {metadata.version('align-eval')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{accuracy,mt-bench}")
    accuracy.add_parser(commands)
    mt_bench.add_parser(commands)
    return parser


_conforms: Command = main
