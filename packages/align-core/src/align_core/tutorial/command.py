"""`align tutorial`: walks the whole road and prints where the report is. Run it again to continue."""

import argparse
import shlex
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from align_core.errors import ConfigError, LayoutError
from align_core.tutorial.report import write_report
from align_core.tutorial.road import Road, steps_of
from align_core.tutorial.smollm2 import SIZES
from align_core.tutorial.tiny import TinyShape, tiny_config
from align_core.tutorial.walk import run_steps

_QUICK_STEPS = 8  # enough to pass through every stage, resume point and conversion; too few to learn
_QUICK_LIMIT = 40
_TENSOR = {"tiny": 2, "smollm2": 1}  # the usual tensor parallel size
_GSM8K_LIMIT = 50  # held-out questions; two cores take seconds for each, and GRPO answers them twice besides


def main(words: Sequence[str]) -> int:
    """Runs with the words after `align tutorial`."""
    options = _parser().parse_args(list(words))
    road = _road(options)
    console = Console()
    outcomes = run_steps(steps_of(road), road.out, console)
    report = write_report(road, outcomes, shlex.join(["align", "tutorial", *words]))
    console.print(f"the report: {report.resolve()}", markup=False, soft_wrap=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="align tutorial", description=__doc__)
    add = parser.add_argument
    add("--model", choices=["tiny", "smollm2"], default="tiny", help="made on the spot, or SmolLM2-135M-Instruct")
    add("--task", choices=["additions", "gsm8k"], help="additions (default of tiny) or gsm8k (default of smollm2)")
    add("--data", type=Path, help="the original GSM8K file (JSON lines), for --task gsm8k")
    add("--out", type=Path, help="directory of everything (default runs/tutorial-MODEL)")
    add("--seed", type=int, default=0, help="of data, initial weights, order and sampling (default 0)")
    add("--steps", type=positive_number, help="updates of every stage instead of the recipe's")
    add("--limit", type=positive_number, help="held-out questions to evaluate on (default all, for smollm2 50)")
    add("--tensor", type=positive_number, help="tensor parallel size of training (default 2 for tiny, 1 for smollm2)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="precision (default float32)")
    add("--quick", action="store_true", help="a few steps of everything: tests the road, teaches little")
    return parser


def _road(options: argparse.Namespace) -> Road:
    """The walk that the options describe; raises ConfigError where they contradict each other."""
    tiny = options.model == "tiny"
    task = options.task or ("additions" if tiny else "gsm8k")
    if tiny != (task == "additions"):
        raise ConfigError(f"the model {options.model!r} cannot do the task {task!r}: tiny adds, smollm2 does gsm8k")
    if task == "gsm8k" and options.data is None:
        raise ConfigError("the task 'gsm8k' needs its file of questions; give --data FILE")
    if task == "gsm8k" and not options.data.is_file():
        raise ConfigError(
            f"--data {options.data} is not there, or is no file; give the original GSM8K file (JSON lines)"
        )
    if task == "additions" and options.data is not None:
        raise ConfigError(f"the task 'additions' makes its own data; leave out --data {options.data}")
    tensor = _tensor(options)
    out: Path = options.out or Path("runs") / f"tutorial-{options.model}"
    limit = options.limit or (_QUICK_LIMIT if options.quick else None if tiny else _GSM8K_LIMIT)
    return Road(
        recipe=options.model,
        out=out,
        seed=options.seed,
        tensor=tensor,
        steps=options.steps or (_QUICK_STEPS if options.quick else None),
        limit=limit,
        max_tokens=8 if tiny else 256,
        context=64 if tiny else 1024,
        dtype=options.dtype,
        make_model=_words("align", "make-model", options.model, "--out", out / "hf" / "start", "--seed", options.seed),
        make_data=_data_command(options, task, out / "data", limit=limit),
        reward_data="ratings" if task == "additions" else "preferences",
    )


def _tensor(options: argparse.Namespace) -> int:
    """Tensor parallel size; raises ConfigError where the converter could not cut the model so."""
    if options.tensor is None:
        return _TENSOR[options.model]
    if find_spec("align_convert") is not None:  # without it the walk says what is to be installed
        from align_core.layouts import check_tensor  # noqa: PLC0415  (its package is optional)

        config = tiny_config(TinyShape()) if options.model == "tiny" else SIZES
        try:
            check_tensor(config, options.tensor)
        except LayoutError as error:
            raise ConfigError(f"{options.model!r} cannot be trained with --tensor {options.tensor}: {error}") from error
    return int(options.tensor)


def _data_command(options: argparse.Namespace, task: str, out: Path, *, limit: int | None) -> tuple[str, ...]:
    command = _words("align", "data", "prepare", task, "--out", out, "--seed", options.seed)
    return command if task == "additions" else (*command, *_words("--held_out", limit, "--source", options.data))


def positive_number(word: str) -> int:
    """For argparse."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _words(*words: object) -> tuple[str, ...]:
    return tuple(str(word) for word in words)
