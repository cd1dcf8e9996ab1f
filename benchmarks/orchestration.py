"""What a step costs beside the work itself: `align grpo` over Ray with ranks and an engine that compute nothing.

    python benchmarks/orchestration.py --out benchmarks/results

The stage, the driver, the worker processes and the calls between them are the real ones; ranks answer with zeros, the
engine with completions that it made at its start, and a weight update sends one small weight. So the seconds of a step
are the driver's and Ray's: making the batch, sending it to every rank, collecting log-probs and rewards, metrics.
Takes a minute.
"""

import argparse
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

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
from align_core.ray.world import RayWorld
from align_core.stages.grpo import run_grpo
from align_core.stages.run import read_metrics
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Batch, Completion, ParamMeta, Prompt, WeightChunk, checksum

WORKERS = 8
LAYOUT = ParallelConfig(tensor=2, data=4)
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


def measure(*, prompts: int, n: int, length: int, steps: int) -> dict[str, Any]:
    """Milliseconds a step, over the steps after the warm-up."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny_model(model, seed=0)
        data = Path(folder) / "data.jsonl"
        data.write_text("".join(json.dumps({"prompt": f"What is {i} + {i}?"}) + "\n" for i in range(4 * prompts)))
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
            reward_model_parallel=LAYOUT,
            parallel=LAYOUT,
            optimizer=OptimizerConfig(lr=1e-6),
            sampling=SamplingConfig(n=n, max_tokens=length),
            engine=EngineConfig(context=length + 64),
            eval_every=10**6,
        )
        sizes = {"vocab": 300, "length": length, "count": prompts * n}
        world = RayWorld(ClusterConfig(), make_rank=make_null_rank, make_host=partial(make_null_host, sizes=sizes))
        began = time.perf_counter()
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
            "workers": WORKERS,
            "steps": len(times),
            "ms_median": float(np.median(times)),
            "ms_p10": float(np.quantile(times, 0.1)),
            "ms_p90": float(np.quantile(times, 0.9)),
            "phases_ms": {name: float(np.median([line[name] for line in lines])) * 1e3 for name in phases},
            "start_to_end_s": time.perf_counter() - began,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for orchestration.json and .md")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    sizes = [(32, 4, 64), (64, 8, 128), (64, 8, 190)]  # the tiny model has 256 positions
    cluster.start(ClusterConfig())
    results = [measure(prompts=p, n=n, length=length, steps=arguments.steps) for p, n, length in sizes]
    cluster.stop()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {
        "commit": commit.stdout.strip(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "target_ms": TARGET_MS,
        "results": results,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "orchestration.json").write_text(json.dumps(facts, indent=2) + "\n")
    (arguments.out / "orchestration.md").write_text(_markdown(facts))
    print(_markdown(facts))


def _markdown(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {r['prompts']} x {r['samples']} | {r['new_tokens']} | {r['ms_p10']:.1f} | **{r['ms_median']:.1f}** | "
        f"{r['ms_p90']:.1f} | " + ", ".join(f"{k.removeprefix('seconds_')} {v:.1f}" for k, v in r["phases_ms"].items())
        for r in facts["results"]
    ]
    return "\n".join(
        [
            "# Orchestration overhead",
            "",
            f"`align grpo` over Ray with {WORKERS} ranks (tensor {LAYOUT.tensor} x data {LAYOUT.data}) and one engine "
            f"that compute nothing: what the driver and Ray cost a step. Target: {facts['target_ms']:.0f} ms. "
            "`python benchmarks/orchestration.py --out benchmarks/results`.",
            "",
            f"{facts['processor']}, {facts['cores']} cores; Python {facts['python']}; commit {facts['commit']}; "
            f"{facts['results'][0]['steps']} steps each.",
            "",
            "| prompts x samples | new tokens | p10 ms | median ms | p90 ms | median of each phase, ms |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
