"""`report.html` of one run: its curves, where the time goes, what the policy says, the settings. `align report RUN`.

Everything is read from the files of the run, finished or not; nothing is computed anew.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from align_core.atomic import write_text
from align_core.errors import DataError, missing_dependency
from align_core.stages.run import read_lines, read_metrics
from align_core.tutorial.curves import Curve, curve_of, draw

# What is drawn, where a run has it.
_SHOWN = {
    "reward": "reward of the samples",
    "eval_reward": "reward, held-out, greedy",
    "eval_accuracy": "accuracy, held-out",
    "eval_accuracy_strict": "accuracy, held-out, strict",
    "eval_loss": "loss, held-out",
    "loss": "loss",
    "accuracy": "pairs ranked rightly",
    "margin": "margin of rewards",
    "kl": "KL to the reference, nats a completion",
    "kl_coef": "weight of the KL",
    "entropy": "entropy, nats a token",
    "clip_fraction": "share of clipped tokens",
    "approx_kl": "KL of an update, nats a token",
    "value_loss": "loss of the value model",
    "value_explained": "variance that the values explain",
    "length": "tokens of a completion",
    "truncated": "share cut off at the limit",
    "tied_groups": "share of groups without a difference",
    "failed_scores": "share that could not be scored",
    "canary_mean": "engine against trainer, mean |nats|",
    "mismatch_kl": "KL of engine and trainer, nats a token",
    "grad_norm": "norm of the gradient",
    "lr": "learning rate",
    "tokens_per_second": "tokens a second, whole step",
}
_SAMPLED_STEPS = 4  # steps whose samples are shown, from the first to the last


def write_page(out: Path) -> Path:
    """Writes OUT/report.html; returns its path.

    Raises:
        DataError: `out` holds no run with a finished step.
        MissingDependencyError: jinja2 or matplotlib is not installed.
    """
    lines = read_metrics(out)
    if not lines or not (out / "config.yaml").is_file():
        raise DataError(f"{str(out)!r} holds no run with a finished step; give the --out of a stage")
    settings = (out / "config.yaml").read_text(encoding="utf-8")
    curves = [found for metric, label in _SHOWN.items() if (found := curve_of(out, metric, label))]
    phases = _phases(lines)
    page = _render(
        name=out.name,
        steps=int(lines[-1]["step"]) + 1,
        total=yaml.safe_load(settings)["steps"],
        minutes=(lines[-1]["time"] - lines[0]["time"]) / 60 if len(lines) > 1 else None,
        curves=curves,
        curves_svg=draw([curve for curve in curves if _moves(curve)]),
        phases=phases,
        longest=max(phases.values(), default=1.0),
        samples=_samples(out),
        settings=settings,
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def main(words: Sequence[str]) -> int:
    """Runs with the words after `align report`."""
    parser = argparse.ArgumentParser(prog="align report", description="Writes RUN/report.html.")
    parser.add_argument("run", type=Path, help="the --out of a stage, finished or not")
    path = write_page(parser.parse_args(list(words)).run)
    Console(stderr=True).print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


def _moves(curve: Curve) -> bool:
    """A flat line tells no more than its number in the table."""
    return len(curve.values) > 1 and min(curve.values) < max(curve.values)


def _phases(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for line in lines for name in line if name.startswith("seconds_"))
    medians = {
        name.removeprefix("seconds_"): statistics.median(line[name] for line in lines if name in line) for name in names
    }
    return {name: seconds for name, seconds in medians.items() if seconds > 0}


def _samples(out: Path) -> list[dict[str, Any]]:
    """The samples of a few steps, the first and the last among them."""
    rows = read_lines(out / "samples.jsonl")
    steps = sorted({row["step"] for row in rows})
    last = len(steps) - 1
    wanted = {steps[round(k * last / (_SAMPLED_STEPS - 1))] for k in range(_SAMPLED_STEPS)} if steps else set()
    return [row for row in rows if row["step"] in wanted]


def _render(**values: Any) -> str:
    try:
        from jinja2 import Environment, PackageLoader  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("jinja2", "align-core[tutorial]", needed_for="the report") from error
    environment = Environment(loader=PackageLoader("align_core.stages"), autoescape=True)
    return environment.get_template("run.html.jinja").render(**values)
