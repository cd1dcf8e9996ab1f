"""What a step costs beside the work itself: `align grpo` over Ray with ranks and an engine that compute nothing.

    python benchmarks/orchestration.py --out benchmarks/results
    python benchmarks/orchestration.py --out benchmarks/results --against ../older  # a checkout of another commit

The stage, the driver, the worker processes and the calls between them are the real ones; ranks answer with zeros, the
engine with completions that it made at its start, and a weight update sends one small weight. So the seconds of a step
are the driver's and Ray's: making the batch, sending it to every rank, collecting log-probs and rewards, metrics.
What the driver costs alone shows the same stage with ranks and engine as plain objects in its own process. With
--against the older commit's own script runs in turns with this one, for the largest batch. Takes a minute; each turn
half of one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from align_core.config import (
    ClusterConfig,
    EngineConfig,
    GrpoConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    TrainerConfig,
)
from align_core.contracts import WeightSink
from align_core.ray import cluster, engine_host
from align_core.ray.engine_host import EngineHost
from align_core.ray.lines import Line
from align_core.ray.world import RayWorld
from align_core.stages.grpo import run_grpo
from align_core.stages.run import Run, read_metrics
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Batch, Completion, ParamMeta, Prompt, WeightChunk, WeightTensor, checksum

WORKERS = 8
META = ParamMeta(name="w", shape=(1024,), dtype="float32")
WARM_UP = 3  # steps that start processes' code paths and are not counted
TARGET_MS = 30.0


class NullRank:
    """A rank that answers at once, with the shapes of a real one."""

    def logprobs(self, batch: Batch) -> np.ndarray:
        return batch.token_column("engine_logprobs").astype(np.float32)

    def scores(self, batch: Batch) -> np.ndarray:
        return np.zeros(len(batch), np.float32)

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        return {"loss": 0.0, "grad_norm": 0.0, "lr": 0.0}

    def weights_layout(self) -> list[ParamMeta]:
        return [META]

    def write_weights(self, file: Path) -> dict[str, int]:
        return {META.name: checksum(np.zeros(META.nbytes, np.uint8), item_bytes=4)}

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        """Nothing to save."""

    def load(self, path: Path) -> Mapping[str, str]:
        raise NotImplementedError

    def export(self, path: Path) -> None:
        """Nothing to export."""


def make_null_rank(config: TrainerConfig, rank: int, meeting: str, timeout_s: float) -> Any:
    return NullRank()


class NullEngine:
    """An engine that knows its answers before it is asked; its own sink."""

    def __init__(self, *, vocab: int, length: int, count: int) -> None:
        rng = np.random.default_rng(0)
        self._tokens = rng.integers(3, vocab, size=(count, length), dtype=np.int32)
        self._logprobs = -rng.random((count, length), dtype=np.float32)
        self.version = 0

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        pairs = [(prompt.id, sample) for prompt in prompts for sample in range(sampling.n)]
        return [
            Completion(
                prompt_id=prompt_id,
                sample=sample,
                tokens=self._tokens[row],
                logprobs=self._logprobs[row],
                finish_reason="length",
                version=self.version,
            )
            for row, (prompt_id, sample) in enumerate(pairs)
        ]

    def weight_sink(self) -> WeightSink:
        return self

    def close(self) -> None:
        """Nothing to free."""

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._pending = version

    def load(self, chunk: WeightChunk) -> None:
        for weight in chunk:
            weight.bytes()

    def commit(self) -> None:
        self.version = self._pending


def make_null_host(model: Path, config: EngineConfig, *, sizes: Mapping[str, int]) -> EngineHost:
    """In the engine's process: all but the engine is as it is for vLLM."""
    engine_host.make_engine = lambda model, config: NullEngine(**sizes)
    return EngineHost(model, config)


class LocalSource:
    """The one weight of the model, in this process."""

    def metadata(self) -> list[ParamMeta]:
        return [META]

    def iterate(self) -> Iterator[WeightTensor]:
        data = np.zeros(META.nbytes, np.uint8)
        yield WeightTensor(meta=META, checksum=checksum(data, item_bytes=4), data=data)


class LocalRank(NullRank):
    """A whole model."""

    def weights(self) -> LocalSource:
        return LocalSource()


class LocalNullWorld:
    """Everything in the driver's process: what is left is the driver's own work."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes

    def trainer(self, config: TrainerConfig) -> Any:
        return LocalRank()

    def engine(self, model: Path, config: EngineConfig) -> NullEngine:
        return NullEngine(**self._sizes)

    def close(self) -> None:
        """Nothing to end."""


class Counted:
    """Messages and bytes that the driver sends and receives over its lines."""

    def __init__(self) -> None:
        self.messages = self.bytes = 0
        send, receive = Line.send, Line.receive

        def counted_send(line: Line, message: bytes) -> None:
            self.messages, self.bytes = self.messages + 1, self.bytes + len(message)
            send(line, message)

        def counted_receive(line: Line) -> bytearray | None:
            message = receive(line)
            self.bytes += len(message or b"")
            return message

        Line.send, Line.receive = counted_send, counted_receive  # type: ignore[method-assign]


class Marks:
    """What the clocks say when the warm-up is over and when the last step is."""

    def __init__(self, counted: Counted) -> None:
        self._counted, self._steps = counted, Run.steps
        self.found: list[tuple[float, float, int, int]] = []

    def __enter__(self) -> "Marks":
        def steps(run: Run, *arguments: Any, **keywords: Any) -> Iterator[int]:
            for step in self._steps(run, *arguments, **keywords):
                if step == WARM_UP:
                    self._mark()
                yield step
            self._mark()

        Run.steps = steps  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        Run.steps = self._steps  # type: ignore[method-assign]

    def _mark(self) -> None:
        below = psutil.Process().children(recursive=True)
        busy = sum(times.user + times.system for times in (child.cpu_times() for child in below))
        self.found.append((time.process_time(), busy, self._counted.messages, self._counted.bytes))

    def per_step(self, steps: int) -> dict[str, float]:
        driver, others, messages, sent = (
            (last - first) / steps for first, last in zip(self.found[0], self.found[1], strict=True)
        )
        return {"driver_cpu_ms": driver * 1e3, "other_cpu_ms": others * 1e3, "messages": messages, "bytes": sent}


def measure(counted: Counted, *, prompts: int, n: int, length: int, steps: int, workers: int) -> dict[str, Any]:
    """Milliseconds a step, over the steps after the warm-up; without workers all is in the driver."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny_model(model, seed=0)
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?"}) + "\n" for i in range(4 * prompts)))
        layout = ParallelConfig(tensor=2, data=max(1, workers // 2))
        config = GrpoConfig(
            model=model,
            data=data,
            out=Path(folder) / "out",
            steps=WARM_UP + steps,
            batch_size=prompts,
            max_length=length + 64,
            save_every=10**6,
            reward="model",
            reward_model=model,
            reward_model_parallel=layout,
            parallel=layout,
            optimizer=OptimizerConfig(lr=1e-6),
            sampling=SamplingConfig(n=n, max_tokens=length),
            engine=EngineConfig(context=length + 64),
            eval_every=10**6,
        )
        sizes = {"vocab": 300, "length": length, "count": prompts * n}
        make_host = partial(make_null_host, sizes=sizes)
        world: Any = LocalNullWorld(sizes)
        if workers:
            world = RayWorld(ClusterConfig(), make_rank=make_null_rank, make_host=make_host)
        with Marks(counted) as marks:
            try:
                run_grpo(config, world)
            finally:
                world.close()
        lines = read_metrics(config.out)[WARM_UP:]
        times = np.diff([line["time"] for line in read_metrics(config.out)])[WARM_UP - 1 :] * 1e3
        phases = sorted(name for name in lines[0] if name.startswith("seconds_"))
        return {
            "prompts": prompts,
            "samples": n,
            "new_tokens": length,
            "workers": workers,
            "steps": len(times),
            "ms_median": float(np.median(times)),
            "ms_p10": float(np.quantile(times, 0.1)),
            "ms_p90": float(np.quantile(times, 0.9)),
            "phases_ms": {name: float(np.median([line[name] for line in lines])) * 1e3 for name in phases},
            **marks.per_step(steps),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for orchestration.json and .md")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--against", type=Path, help="checkout of another commit, to run in turns with")
    parser.add_argument("--turns", type=int, default=3, help="of each, with --against")
    arguments = parser.parse_args()
    if arguments.against:
        facts = json.loads((arguments.out / "orchestration.json").read_text())
        more = in_turns(arguments.against, turns=arguments.turns, steps=arguments.steps)
        facts["turns"] = joined(facts.get("turns"), more)
    else:
        facts = everything(arguments.steps)
        before = arguments.out / "orchestration.json"
        facts["turns"] = json.loads(before.read_text()).get("turns") if before.exists() else None
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "orchestration.json").write_text(json.dumps(facts, indent=2) + "\n")
    (arguments.out / "orchestration.md").write_text(_markdown(facts))
    print(_markdown(facts))


def everything(steps: int) -> dict[str, Any]:
    """All sizes and numbers of workers, with the machine that they ran on."""
    sizes = [(32, 4, 64), (64, 8, 128), (64, 8, 190)]  # the tiny model has 256 positions
    runs = [(*size, workers) for workers in (8, 2, 0) for size in (sizes if workers == WORKERS else sizes[-1:])]
    counted = Counted()
    cluster.start(ClusterConfig())
    results = [
        measure(counted, prompts=prompts, n=n, length=length, steps=steps, workers=workers)
        for prompts, n, length, workers in runs
    ]
    cluster.stop()
    return {
        "commit": _commit(Path()),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "target_ms": TARGET_MS,
        "results": results,
    }


def in_turns(other: Path, *, turns: int, steps: int) -> dict[str, Any]:
    """The largest batch under eight workers, by the two commits' own scripts alternately; medians, ms."""
    here = Path(__file__).parent.parent
    found: dict[str, list[float]] = {"then": [], "now": []}
    for _ in range(turns):
        for name, checkout in (("then", other), ("now", here)):
            with tempfile.TemporaryDirectory() as folder:
                paths = os.pathsep.join(str(path.resolve()) for path in checkout.glob("packages/*/src"))
                command = [sys.executable, "benchmarks/orchestration.py", "--out", folder, "--steps", str(steps)]
                subprocess.run(
                    command, cwd=checkout, env={**os.environ, "PYTHONPATH": paths}, check=True, capture_output=True
                )
                results = json.loads((Path(folder) / "orchestration.json").read_text())["results"]
            largest = [r["ms_median"] for r in results if r["workers"] == WORKERS][-1]
            found[name].append(largest)
    return {"then_commit": _commit(other), "now_commit": _commit(here), **found}


def joined(before: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    """The turns of several calls, as long as the commits are the same."""
    if not before or any(before[name] != more[name] for name in ("then_commit", "now_commit")):
        return more
    return {**more, **{name: [*before[name], *more[name]] for name in ("then", "now")}}


def _commit(checkout: Path) -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False).stdout.strip()


def _markdown(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {r['workers'] or 'none: all in the driver'} | {r['prompts']} x {r['samples']} | {r['new_tokens']} | "
        f"{r['ms_p10']:.1f} | **{r['ms_median']:.1f}** | {r['ms_p90']:.1f} | {r['driver_cpu_ms']:.1f} | "
        f"{r['other_cpu_ms']:.1f} | {r['messages']:.0f} | {r['bytes'] / 1e6:.2f} | "
        + ", ".join(f"{k.removeprefix('seconds_')} {v:.1f}" for k, v in r["phases_ms"].items())
        + " |"
        for r in facts["results"]
    ]
    return "\n".join(
        [
            "# Orchestration overhead",
            "",
            f"`align grpo` over Ray with {WORKERS} ranks and one engine that compute nothing: what the driver, Ray and "
            f"the calls between processes cost a step. Target: {facts['target_ms']:.0f} ms. "
            "`python benchmarks/orchestration.py --out benchmarks/results`.",
            "",
            f"{facts['processor']}, {facts['cores']} cores; Python {facts['python']}; commit {facts['commit']}; "
            f"{facts['results'][0]['steps']} steps each after {WARM_UP} of warm-up; load at the end "
            f"{facts['load']:.1f}.",
            "",
            "| workers | prompts x samples | new tokens | p10 ms | median ms | p90 ms | CPU of the driver, ms | CPU of "
            "all others, ms | messages to workers | MB both ways | median of each phase, ms |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "CPU is user and system time a step, of the driver with Ray's threads in it, and of all processes below it "
            "(workers, engine, Ray's daemons). Batches lie in shared memory and are not among the bytes.",
            "",
            *_turns(facts.get("turns")),
        ]
    )


def _turns(turns: Mapping[str, Any] | None) -> list[str]:
    if not turns:
        return []
    pairs = ", ".join(f"{then:.1f} / {now:.1f}" for then, now in zip(turns["then"], turns["now"]))
    ratio = np.median(np.asarray(turns["now"]) / np.asarray(turns["then"]))
    return [
        f"In turns with commit {turns['then_commit']} (its own script, {WORKERS} workers, the largest batch), median "
        f"ms a step then / now ({turns['now_commit']}): {pairs}; median ratio {ratio:.2f}. `python "
        "benchmarks/orchestration.py --out benchmarks/results --against CHECKOUT`.",
        "",
    ]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
