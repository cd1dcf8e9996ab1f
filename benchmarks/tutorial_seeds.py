"""Runs the tiny tutorial for several seeds and writes the table of what each stage reached, with its spread.

    python benchmarks/tutorial_seeds.py --seeds 0 1 2 --runs runs/seeds --out benchmarks/results/tutorial-tiny

Runs found complete are not repeated. Numbers come from each run's summary.json.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODELS = {
    "start": "untrained start",
    "sft": "SFT",
    "rlhf": "RLHF (PPO), reward model",
    "online_dpo": "Online DPO, reward model",
    "grpo": "GRPO, verifiable reward",
    "grpo_reward_model": "GRPO, reward model",
    "dpo": "DPO",
}


def main() -> None:
    """Reads the arguments, runs, writes OUT.md and OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tutorial-tiny"))
    options = parser.parse_args()
    summaries = [_run(seed, options.runs / f"seed-{seed}") for seed in options.seeds]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    facts = {"commit": commit.stdout.strip(), "machine": summaries[0]["machine"], "versions": summaries[0]["versions"]}
    options.out.with_suffix(".json").write_text(json.dumps({**facts, "runs": summaries}, indent=2) + "\n")
    options.out.with_suffix(".md").write_text(table(summaries, facts))


def table(summaries: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = [str(s["seed"]) for s in summaries]
    lines = [
        "# The tiny tutorial over seeds",
        "",
        f"`align tutorial --model tiny --seed N` for the seeds {', '.join(seeds)}; the seed sets data split, initial "
        "weights, order and sampling. Greedy accuracy on held-out questions, by vLLM, per cent.",
        "",
        f"| model | {' | '.join('seed ' + s for s in seeds)} | mean | standard deviation | least |",
        "|---|" + "---:|" * (len(seeds) + 3),
    ]
    for key, name in MODELS.items():
        lines.append(_row(name, [100 * s["accuracy"][key]["accuracy"] for s in summaries]))
    for key in ("rlhf", "online_dpo", "grpo", "grpo_reward_model", "dpo"):
        lines.append(_row(f"points above SFT: {MODELS[key]}", [s["points_above_sft"][key] for s in summaries]))
    lines.append(_row("held-out pairs the reward model ranks rightly", _reward_accuracy(summaries)))
    lines += [
        "",
        f"Questions held out: {summaries[0]['accuracy']['sft']['n']} a seed.",
        "",
        "Curves, first tenth to last tenth of the steps:",
        "",
    ]
    lines += [f"| curve | {' | '.join('seed ' + s for s in seeds)} |", "|---|" + "---:|" * len(seeds)]
    for index, curve in enumerate(summaries[0]["curves"]):
        cells = [s["curves"][index] for s in summaries]
        values = " | ".join(f"{c['first_tenth']:.3f} to {c['last_tenth']:.3f}" for c in cells)
        lines.append(f"| {curve['label']} | {values} |")
    minutes = ", ".join(f"{s['seconds'] / 60:.1f}" for s in summaries)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines += [
        "",
        f"Minutes of wall time a run: {minutes}, on {facts['machine']['cpus']} processors ({_processor()}).",
        "",
        f"Commit {facts['commit']}; Python {facts['machine']['python']}; {versions}.",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    cells = " | ".join(f"{value:.1f}" for value in values)
    return f"| {name} | {cells} | {statistics.fmean(values):.1f} | {spread:.1f} | {min(values):.1f} |"


def _reward_accuracy(summaries: Sequence[dict[str, Any]]) -> list[float]:
    return [100 * s["reward_model_eval_accuracy"] for s in summaries]


def _run(seed: int, out: Path) -> dict[str, Any]:
    align = Path(sys.executable).parent / "align"
    if not (out / "summary.json").exists():
        subprocess.run([str(align), "tutorial", "--model", "tiny", "--seed", str(seed), "--out", str(out)], check=True)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    return summary


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
