"""`align-eval mt-bench {answer,judge,report}`: the options. What they do is in `STEP_step`."""

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import get_args

from align_core.text import TemplateName
from align_eval.options import add_engine_options, add_service_options

_OPENAI = "https://api.openai.com/v1"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `mt-bench` to the commands of align-eval."""
    parser = commands.add_parser("mt-bench", help="80 two-turn questions, graded by a judge model")
    steps = parser.add_subparsers(dest="step", required=True, metavar="{answer,judge,report}")
    _add_answer(steps.add_parser("answer", help="let models answer the questions"))
    _add_judge(steps.add_parser("judge", help="let a judge grade the answers"))
    _add_report(steps.add_parser("report", help="write report.md, report.json and report.html"))
    for step in ("answer", "judge", "report"):
        steps.choices[step].set_defaults(run=_runner(step))


def _runner(step: str) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        status: int = import_module(f"align_eval.mt_bench.{step}_step").run(arguments)
        return status

    return run


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run; continued if it exists")
    add("--data", type=Path, metavar="DIR", help="folder with MT-Bench's data (default: an installed package's)")


def _add_answer(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    add = parser.add_argument
    add(
        "--model",
        action="append",
        required=True,
        metavar="[NAME=]MODEL",
        help="Hugging Face or Megatron directory, or with --url the service's model; repeatable",
    )
    add("--limit", type=int, help="only the first LIMIT questions of each category")
    add("--max-tokens", type=int, default=1024, help="most new tokens a turn (default 1024, as FastChat)")
    add("--temperature", type=float, help="one temperature for all (default: by category, as FastChat)")
    add("--seed", type=int, default=0, help="of sampling")
    add(
        "--template",
        choices=get_args(TemplateName),
        default="auto",
        help="prompt template; auto, the default, takes the tokenizer's own if it has one, else human-assistant",
    )
    add("--accept-empty", action="store_true", help="an empty reply of the service is an answer, not a failure")
    add_service_options(parser, url=None)
    add_engine_options(parser, context=4096)


def _add_judge(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    add = parser.add_argument
    add("--judge", default="gpt-4", metavar="[NAME=]MODEL", help="the service's model that judges (default gpt-4)")
    add("--model", action="append", metavar="NAME", help="models to judge, repeatable (default: all with answers)")
    add(
        "--mode",
        choices=("single", "pairwise-baseline", "pairwise-all"),
        default="single",
        help="rate each answer, or compare answers in both orders: all with the baseline, or all with all",
    )
    add("--baseline", metavar="NAME", help="model to compare with in pairwise-baseline")
    add(
        "--references",
        default="original",
        metavar="{original,corrected,FILE}",
        help="reference answers for math, reasoning and coding (default original)",
    )
    add("--limit", type=int, help="only the first LIMIT questions of each category")
    add("--samples", type=int, default=1, help="verdicts an answer; the median counts (default 1)")
    add("--max-tokens", type=int, default=2048, help="most tokens of a verdict (default 2048)")
    add("--temperature", type=_temperature, default=0.0, help="of the judge (default 0); `none` leaves it out")
    add("--reasks", type=int, default=2, help="times an unreadable verdict is asked for again (default 2)")
    add("--compatible", action="store_true", help="read verdicts as FastChat does, with its faults; ask once")
    add("--seed", type=int, default=0, help="of the judge's sampling")
    add("--dry-run", action="store_true", help="say how many calls there would be and what they cost; ask nothing")
    add("--budget", type=float, metavar="USD", help="spend no more in this run; repeats after failures come on top")
    add(
        "--prices",
        type=Path,
        metavar="FILE",
        help='JSON {"model": {"prompt": X, "completion": Y}}, USD a million tokens',
    )
    add(
        "--max-failures",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="exit status 1 if more verdicts than this share are missing (default 0.1)",
    )
    add_service_options(parser, url=_OPENAI)


def _add_report(parser: argparse.ArgumentParser) -> None:
    _add_common(parser)
    add = parser.add_argument
    add("--judge", metavar="NAME", help="whose judgments (default: the only judge there is)")
    add(
        "--judgments",
        type=Path,
        action="append",
        metavar="FILE",
        help="judgments in FastChat's format instead, single or pair; repeatable",
    )
    add("--references", default="original", metavar="{original,corrected,FILE}", help="shown beside the questions")
    add("--limit", type=int, help="with --judgments: only the first LIMIT questions of each category are expected")
    add("--compatible", action="store_true", help="print FastChat's own tables, from the scores as they stand")


def _temperature(text: str) -> float | None:
    return None if text == "none" else float(text)
