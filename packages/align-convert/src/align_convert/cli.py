"""The `align-convert` command, also mounted as `align convert`: reads arguments, reports errors, sets the exit status.

Exit status: 0 done (or equal), 1 `verify` found a difference, 2 refused, 130 interrupted.
What the commands do is in `commands.py`, imported (and torch with it) only once the arguments are right.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib import import_module, metadata
from pathlib import Path

from align_convert.errors import ConvertError

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_DIR = "a Hugging Face or Megatron directory"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; does not raise for what a user can do wrong."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse has printed the help or the reason
        return stop.code if isinstance(stop.code, int) else 2
    try:
        status: int = getattr(import_module("align_convert.commands"), arguments.command)(arguments)
    except (ConvertError, OSError) as error:
        if getattr(arguments, "json", False):
            sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        sys.stderr.write(f"align-convert: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("align-convert: interrupted; run it again with --resume to go on, or without to begin anew\n")
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="align-convert", description="Convert Llama-family checkpoints between Hugging Face and Megatron-core."
    )
    parser.add_argument("--version", action="version", version=f"align-convert {metadata.version('align-convert')}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_to_megatron(
        commands.add_parser("to-megatron", help="write a Megatron directory for a parallel layout"), "to_megatron"
    )
    _add_to_megatron(commands.add_parser("reshard", help="cut a Megatron directory anew for another layout"), "reshard")
    _add_to_hf(commands.add_parser("to-hf", help="write a Hugging Face directory"))
    _add_plan(commands.add_parser("plan", help="say what a copy would write and whether it can be done; write nothing"))

    command = commands.add_parser("inspect", help="say what a directory holds")
    command.add_argument("source", metavar="DIR", type=Path, help=_DIR)
    command.add_argument("--json", action="store_true", help="everything, as one JSON object")
    command.set_defaults(command="inspect")

    command = commands.add_parser("verify", help="compare two directories bit by bit, or one with its checksums")
    command.add_argument("a", metavar="A", type=Path, help=_DIR)
    command.add_argument("b", metavar="B", type=Path, nargs="?", help="another, of any format and layout")
    command.add_argument("--logits", action="store_true", help="also compare what both compute (align-convert[verify])")
    command.add_argument("--json", action="store_true", help="the result as one JSON object")
    _add_memory(command)
    command.set_defaults(command="verify")
    return parser


def _add_to_megatron(command: argparse.ArgumentParser, name: str) -> None:
    source = "Megatron directory" if name == "reshard" else "Hugging Face directory, or a Megatron one to re-cut"
    command.add_argument("source", metavar="DIR", type=Path, help=source)
    command.add_argument("destination", metavar="OUT", type=Path, help="Megatron directory to write")
    _add_layout(command)
    _add_copy_options(command)
    command.set_defaults(command=name)


def _add_layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default: 1)")
    command.add_argument("--pp", type=int, default=1, metavar="N", help="pipeline parallel size (default: 1)")
    command.add_argument("--vp", type=int, default=1, metavar="N", help="virtual pipeline chunks a stage (default: 1)")
    command.add_argument("--ep", type=int, default=1, metavar="N", help="expert parallel size (default: 1)")
    command.add_argument("--first-stage-layers", type=int, metavar="N", help="layers of the first stage, if not even")
    command.add_argument("--last-stage-layers", type=int, metavar="N", help="layers of the last stage, if not even")
    command.add_argument(
        "--chunk-layers",
        type=_counts,
        metavar="N,N,...",
        help="layers of each of the pp x vp chunks in the order of computation, for any other split",
    )
    command.add_argument(
        "--vocab-divisor",
        type=int,
        default=128,
        metavar="N",
        help="Megatron's --make-vocab-size-divisible-by: pad the vocabulary to a multiple of N x tp (default: 128)",
    )
    formats = ("torch", "torch_dist")
    command.add_argument(
        "--format", choices=formats, default="torch", help="torch: a file a rank; torch_dist: for any layout"
    )
    namings = ("local", "te", "te-grouped", "legacy")
    command.add_argument(
        "--names",
        choices=namings,
        default="local",
        help="of torch files: megatron-core's local or Transformer Engine spec, or legacy Megatron-LM",
    )


def _add_to_hf(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="DIR", type=Path, help="Megatron directory: its root or one iteration")
    command.add_argument("destination", metavar="OUT", type=Path, help="Hugging Face directory to write")
    _add_shard_size(command)
    _add_copy_options(command)
    command.set_defaults(command="to_hf")


def _add_shard_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="of a safetensors file, e.g. 500MB or 2GiB (default: 5GB)",
    )


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", choices=("to-megatron", "to-hf"), help="what to plan")
    command.add_argument("source", metavar="DIR", type=Path, help=_DIR)
    command.add_argument("destination", metavar="OUT", type=Path, help="directory that would be written")
    _add_layout(command)
    _add_shard_size(command)
    _add_copy_options(command)
    command.set_defaults(command="plan")


def _add_copy_options(command: argparse.ArgumentParser) -> None:
    names = ("float32", "float16", "bfloat16")
    command.add_argument("--dtype", choices=names, help="cast weights (default: keep the source's type)")
    command.add_argument("--overwrite", action="store_true", help="replace a checkpoint that is already at OUT")
    command.add_argument("--resume", action="store_true", help="go on where a run that was killed has stopped")
    command.add_argument("--dry-run", action="store_true", help="check everything, say what would be written, stop")
    command.add_argument("--json", action="store_true", help="the result as one JSON object")
    _add_memory(command)


def _add_memory(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--memory",
        type=_size,
        default="512MiB",
        metavar="SIZE",
        help="for buffers, above what Python and torch take (default: 512MiB)",
    )
    command.add_argument("--threads", type=int, default=4, metavar="N", help="that read and write (default: 4)")
    command.add_argument(
        "--io",
        choices=("direct", "buffered"),
        default="direct",
        help="past the page cache (default), or through it, for sources that are in it already",
    )


def _size(text: str) -> int:
    """`5GB` -> 5000000000 bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(match.group(1)) * _UNITS[(match.group(2) or "").upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write e.g. 500MB, 5GB or 2GiB")
    return size


def _counts(text: str) -> tuple[int, ...]:
    """`3,4,4,3` -> (3, 4, 4, 3)."""
    if not re.fullmatch(r"\d+(,\d+)*", text.strip()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers; write e.g. 3,4,4,3")
    return tuple(int(number) for number in text.split(","))
