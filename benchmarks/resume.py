"""Kills `align grpo` with SIGKILL in each of its phases, runs the same command again, and compares the metrics.

    python benchmarks/resume.py --schedule sync --out benchmarks/results
    python benchmarks/resume.py --schedule one_step_off --out benchmarks/results
    python benchmarks/resume.py --schedule async --out benchmarks/results
    python benchmarks/resume.py --schedule in_process --out benchmarks/results

Real Megatron, real vLLM, Ray (except in_process); the tiny model on CPU, which a reward for digits makes learn. One run
is left undisturbed. Another is killed at a point drawn by the seed: a phase (weight sync, generation, scoring,
training, saving), a call of it since the start, and a moment within that call; continued and killed at the next point;
and so on, until the last continuation ends by itself. Whatever a continuation logs must equal the undisturbed run bit
for bit, but for seconds. resume.md is written from all resume-*.json in the directory. About 25 s a point.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from align_core import cli
from align_core.stages import collect, grpo, schedule
from align_core.stages.rewards import Rewards
from align_core.stages.run import Run
from align_core.stages.stream import Stream
from align_core.tutorial.additions import write_additions
from align_core.tutorial.tiny import make_tiny_model
from align_rollout import environment

PHASES = ("sync", "generate", "score", "train", "save")
KINDS = ("sync", "one_step_off", "async", "in_process")
SAVE_EVERY = 2
DEADLINE_S = 600.0
REWARD = '''"""Rewards the share of digits."""

from align_core.types import Score


def digits(prompts, completions, columns):
    return [Score(value=sum(c.isdigit() for c in text) / max(len(text), 1)) for text in completions]
'''
NOT_REPEATED = ("time", "seconds", "per_s", "mfu", "memory")  # parts of names of what a clock or a device says


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument(
        "--schedule",
        choices=KINDS,
        default="sync",
        help="in_process: sync without Ray, in forks of a process that has imported everything; 10 s a run. "
        "async: staleness 1, completions under way end before new weights come",
    )
    parser.add_argument("--points", type=int, default=10, help="kills; phases take turns")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phase", choices=PHASES, help="kill in this phase only")
    if sys.argv[1:2] == ["--child"]:
        return run_until_killed(json.loads(sys.argv[2]), sys.argv[3:])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        phases = [arguments.phase] if arguments.phase else PHASES
        kind, points, seed = arguments.schedule, arguments.points, arguments.seed
        record = prove(Path(folder), kind=kind, points=points, seed=seed, phases=phases)
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"resume-{arguments.schedule}" + (f"-{arguments.phase}" if arguments.phase else "")
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    found = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("resume-*.json"))]
    (arguments.out / "resume.md").write_text(_markdown(found))
    print(_markdown(found))
    good = record["finished_equal"] and all(point["equal"] and point["killed"] for point in record["points"])
    return 0 if good else 1


def prove(folder: Path, *, kind: str, points: int, seed: int, phases: Sequence[str]) -> dict[str, Any]:
    """Everything that one schedule showed."""
    make_tiny_model(folder / "hf", seed=0)
    write_additions(folder / "data", seed=0)
    (folder / "reward.py").write_text(REWARD)
    rng = random.Random(f"{kind} {seed}")
    if kind == "in_process":
        preload()
    steps = 3 * points + 4  # a point is at most 4 steps further on than the one before, most are 2 or none
    complete(words_of(folder, "whole", kind, steps), kind)
    whole = metrics(folder / "whole")
    words = words_of(folder, "killed", kind, steps)
    found: list[dict[str, Any]] = []
    for number in range(points):
        point = draw(rng, phases[number % len(phases)])
        began = time.perf_counter()
        killed = kill(point, words, kind)
        logged = metrics(folder / "killed")
        judge(found, logged, whole)
        checkpoints = sorted(path.name for path in (folder / "killed" / "checkpoints").glob("step_*"))
        found.append({**point, "killed": killed, "lines_logged_before": len(logged), "checkpoints": checkpoints})
        found[-1]["seconds"] = round(time.perf_counter() - began, 1)
        print(found[-1], flush=True)
    complete(words, kind)
    judge(found, metrics(folder / "killed"), whole)
    return {
        "schedule": kind,
        "seed": seed,
        "steps": steps,
        "save_every": SAVE_EVERY,
        "rewards": [line["reward"] for line in whole],
        "grad_norms": [line["grad_norm"] for line in whole],
        "staleness": [line.get("staleness", 0.0) for line in whole],
        "values_compared": sum(len(line) for line in whole),
        "finished_equal": metrics(folder / "killed") == whole,
        "points": found,
        "commit": _output(["git", "rev-parse", "--short", "HEAD"]),
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }


def draw(rng: random.Random, phase: str) -> dict[str, Any]:
    """A point: the phase, how many calls of it end before, and seconds into the next one."""
    calls = rng.randrange(2) if phase == "save" else rng.randrange(1, 4)
    return {"phase": phase, "call": calls, "delay_s": round(rng.uniform(0.0, 0.05), 4)}


def judge(found: Sequence[dict[str, Any]], logged: Sequence[object], whole: Sequence[object]) -> None:
    """Of points without a verdict: whether what was logged since, and all before, is as if nothing had happened.

    A continuation that was killed before it logged anything leaves the verdict to the next one.
    """
    for point in found:
        first = max([0, *map(_number, point["checkpoints"])])  # what the continuation logged begins here
        if "equal" not in point and len(logged) > first:
            point["equal"] = list(logged) == list(whole[: len(logged)])


def _number(checkpoint: str) -> int:
    return int(checkpoint.removeprefix("step_"))


def words_of(folder: Path, out: str, kind: str, steps: int) -> list[str]:
    """The command line after `align`."""
    where = {
        "sync": ("--cluster.placement", "colocated"),
        "one_step_off": ("--cluster.placement", "disaggregated", "--schedule.kind", "one_step_off"),
        "async": (
            *("--cluster.placement", "disaggregated", "--schedule.kind", "async"),
            *("--schedule.max_staleness", "1", "--engine.in_flight", "drain"),
        ),
        "in_process": ("--cluster.in_process", "true"),
    }[kind]
    return [
        *("grpo", "--model", str(folder / "hf"), "--data", str(folder / "data" / "prompts.jsonl")),
        *("--out", str(folder / out), "--steps", str(steps), "--save_every", str(SAVE_EVERY)),
        *("--batch_size", "8", "--max_length", "64", "--reward", f"{folder / 'reward.py'}:digits"),
        *("--scoring.workers", "1", "--sampling.n", "4", "--sampling.max_tokens", "8", "--optimizer.lr", "0.003"),
        *("--engine.context", "64", "--engine.kv_cache_mib", "64", "--loss.kl_coef", "0.01"),
        *where,
    ]


def preload() -> None:
    """Imports what a run needs, so that its forks need not."""
    environment.prepare("cpu")
    for module in ("vllm", "align_core.megatron.trainer", "align_core.advantages", "transformers"):
        importlib.import_module(module)


def complete(words: Sequence[str], kind: str) -> None:
    """Runs `align WORDS` to its end."""
    if kind != "in_process":
        subprocess.run([sys.executable, "-m", "align_core", *words], check=True, timeout=DEADLINE_S)
    elif _fork(cli.main, list(words)) != 0:
        raise SystemExit("the run failed")


def kill(point: Mapping[str, Any], words: Sequence[str], kind: str) -> bool:
    """Runs until the point, where the driver and all its children get SIGKILL; False if it ended before."""
    if kind == "in_process":
        return _fork(run_until_killed, point, list(words)) == -signal.SIGKILL
    command = [sys.executable, __file__, "--child", json.dumps(dict(point)), *words]
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=DEADLINE_S) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _fork(function: Callable[..., int], *arguments: Any) -> int:
    """The exit status of a fork that calls the function in a process group of its own; minus a signal's number."""

    def body() -> None:
        os.setsid()
        sys.exit(function(*arguments))

    process = multiprocessing.get_context("fork").Process(target=body)
    process.start()
    process.join(DEADLINE_S)
    return process.exitcode if process.exitcode is not None else 1


def run_until_killed(point: Mapping[str, Any], words: list[str]) -> int:
    """In the child: `align WORDS` with a hook on one phase, which ends the process group at its step."""
    owner, name = {
        "sync": (collect, "synchronise"),
        "generate": (schedule, "collect"),
        "score": (Rewards, "score"),
        "train": (grpo, "update"),
        "save": (Run, "_save"),
    }[point["phase"]]
    if point["phase"] == "generate" and "async" in words:
        owner, name = Stream, "take"
    setattr(owner, name, _fatal(getattr(owner, name), call=point["call"], delay_s=point["delay_s"]))
    return cli.main(words)


def _fatal(function: Callable[..., Any], *, call: int, delay_s: float) -> Callable[..., Any]:
    """The function; `delay_s` into its call number `call`, or at that call's return, the process group dies."""
    calls = 0

    def die() -> None:
        os.killpg(os.getpgid(0), signal.SIGKILL)

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls - 1 != call:
            return function(*arguments, **keywords)
        timer = threading.Timer(delay_s, die)
        timer.start()
        function(*arguments, **keywords)
        return die()

    return wrapped


def metrics(out: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl without what a clock says."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{k: v for k, v in line.items() if not any(part in k for part in NOT_REPEATED)} for line in lines]


def _markdown(records: Sequence[Mapping[str, Any]]) -> str:
    points = [(record["schedule"], point) for record in records for point in record["points"]]
    rows = [
        f"| {kind} | {p['phase']} | {p['call']} | {1000 * p['delay_s']:.0f} | {p['lines_logged_before']} | "
        f"{', '.join(p['checkpoints']) or 'none'} | {_verdict(p)} |"
        for kind, p in points
    ]
    good = sum(p["equal"] and p["killed"] for _, p in points)
    killed = sum(p["killed"] for _, p in points)
    facts = [
        f"* {r['schedule']}: {r['steps']} steps, in the end all {'equal' if r['finished_equal'] else '**not equal**'}; "
        f"staleness up to {max(r['staleness']):.0f}; reward {r['rewards'][0]:.4f} to {r['rewards'][-1]:.4f}, norms "
        f"{min(r['grad_norms']):.3g} to {max(r['grad_norms']):.3g}; {r['values_compared']} values compared a run; "
        f"{r['machine']}; commit {r['commit']}; seed {r['seed']}"
        for r in records
    ]
    return "\n".join(
        [
            "# Killed anywhere, continued bit for bit",
            "",
            f"`align grpo` (Megatron, vLLM on CPU, Ray but for in_process; tiny model, checkpoint every {SAVE_EVERY} "
            "steps) got SIGKILL, driver and children, so long into the named call of the phase since its start; the "
            f"same command ran again and was killed at the next point. {good} of {killed} kills were followed by the "
            "metrics of the undisturbed run, bit for bit. `python benchmarks/resume.py --schedule sync --out "
            "benchmarks/results`, and so for each schedule.",
            "",
            *facts,
            "",
            "| schedule | phase | call | after, ms | steps logged | checkpoints then | equal |",
            "|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _verdict(point: Mapping[str, Any]) -> str:
    if not point["killed"]:
        return "not killed: the run has no such call"
    return "yes" if point["equal"] else "**no**"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
