"""Over Ray: each rank of a tensor-parallel trainer sends its parts to the ranks of live vLLM engines (gloo on CPU).

What the engines then say equals Hugging Face on the exported weights; what goes wrong on the way is named; an engine
that is killed afterwards comes back with what it had, and meets the trainer again at the next update.
"""

import itertools
import json
import logging
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")
pytest.importorskip("megatron.core")

import torch
from transformers import LlamaForCausalLM

from align_convert import load_any
from align_convert.copy import to_hf
from align_core.config import (
    ClusterConfig,
    EngineConfig,
    OptimizerConfig,
    ParallelConfig,
    SamplingConfig,
    SftLoss,
    TrainerConfig,
)
from align_core.errors import ConfigError, LayoutError, SyncError
from align_core.ray import cluster, trainer
from align_core.ray.engine import RayEngine
from align_core.ray.source import DirectWorkersSource, SharedMemorySource
from align_core.ray.trainer import RayTrainer
from align_core.ray.world import RayWorld
from align_core.stages.sync import SyncReport, synchronise
from align_core.tutorial.tiny import make_tiny_model
from align_core.types import Batch, Completion, Prompt

pytestmark = pytest.mark.slow

_GREEDY = SamplingConfig(max_tokens=10, temperature=0)
_VERSIONS = itertools.count(1)


class World:
    """A trainer of two ranks whose sending can be disturbed, and engines."""

    def __init__(self, folder: Path, parallel: ParallelConfig) -> None:
        self.folder, self.model, self.fault = folder, folder / "hf", folder / "fault.json"
        make_tiny_model(self.model, seed=3)
        self.world = RayWorld(
            ClusterConfig(placement="disaggregated", share_workers=False), make_rank=_faulty_rank(self.fault)
        )
        self.trainer = self.new_trainer(parallel)
        self.exports = itertools.count()

    def new_trainer(self, parallel: ParallelConfig) -> RayTrainer:
        config = TrainerConfig(model=self.model, steps=20, parallel=parallel, optimizer=OptimizerConfig(lr=0.03))
        made = self.world.trainer(config)
        assert isinstance(made, RayTrainer)
        return made

    def engine(self, **settings: Any) -> RayEngine:
        made = self.world.engine(self.model, EngineConfig(context=64, kv_cache_mib=32, transport="links", **settings))
        assert isinstance(made, RayEngine)
        return made

    def train(self) -> None:
        tokens = np.random.default_rng(5).integers(3, 300, 40).astype(np.int32)
        batch = Batch(tokens=tokens, offsets=np.array([0, 40]), token_columns={"mask": np.arange(40) > 0})
        self.trainer.step(batch, SftLoss())

    def send(self, engine: RayEngine, version: int, **settings: Any) -> SyncReport:
        settings = {"transport": "links", "verify": "full", **settings}
        return synchronise(self.trainer.weights(), engine.weight_sink(), version=version, **settings)

    def expected(self) -> list[list[int]]:
        """Greedy tokens of Hugging Face on the trainer's weights of now."""
        number = next(self.exports)
        self.trainer.export(self.folder / f"megatron-{number}")
        to_hf(load_any(self.folder / f"megatron-{number}"), self.folder / f"hf-{number}")
        twin = LlamaForCausalLM.from_pretrained(self.folder / f"hf-{number}", dtype=torch.float32)
        found = []
        for prompt in prompts():
            ids = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
            answer = twin.generate(ids, max_new_tokens=10, do_sample=False, pad_token_id=0)
            found.append(answer[0, len(prompt.tokens) :].tolist())
        return found


def _faulty_rank(fault: Path) -> Any:
    """Ranks as they are, but for what the file `fault` asks rank 1 to do once."""

    def make(config: TrainerConfig, rank: int, meeting: str, timeout_s: float) -> Any:
        made = trainer._make_rank(config, rank, meeting, timeout_s)
        honest = made.send_weights

        def send(seat: Any, rows: Any) -> dict[str, int]:
            asked = json.loads(fault.read_text()) if rank == 1 and fault.is_file() else {}
            if not asked:
                return honest(seat, rows)
            fault.unlink()
            if asked["do"] == "send nothing":
                made.live_weights()._end.sit(seat)
                made.live_weights()._end.join()
                return {}
            sums = made.weight_checksums(rows)
            with torch.no_grad():
                made.live_weights().tensors()[asked["tensor"]][1, 2] += 1
            honest(seat, rows)
            return sums

        made.send_weights = send
        return made

    return make


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    made = World(tmp_path_factory.mktemp("linked"), ParallelConfig(tensor=2))
    yield made
    made.world.close()
    cluster.stop()


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [Prompt(id=k, tokens=rng.integers(3, 300, size=5 + k, dtype=np.int32)) for k in range(4)]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def kill(engine: RayEngine, replica: int) -> None:
    os.kill(engine._replicas[replica].workers.processes.whereabouts[0].pid, signal.SIGKILL)


def check(world: World, engine: RayEngine, version: int) -> None:
    """The engine, each of its replicas, says what Hugging Face says."""
    expected = world.expected()
    for replica in engine._replicas:
        found = replica.ask("generate", prompts(), _GREEDY)
        assert tokens(found) == expected
        assert {completion.version for completion in found} == {version}


def test_two_replicas_follow_two_ranks_and_a_killed_one_comes_back(
    two_ranks: World, caplog: pytest.LogCaptureFixture
) -> None:
    engine = two_ranks.engine(replicas=2)
    for verify in ("full", "sampled", "off"):
        version = next(_VERSIONS)
        report = two_ranks.send(engine, version, verify=verify)
        assert report.way == "links"
        assert {"join", "receive", "sum", "compare"} <= report.seconds.keys()
        check(two_ranks, engine, version)
        two_ranks.train()  # so the next update is another one, and the trainer has moved on from this one
    before = tokens(engine.generate(prompts(), _GREEDY))
    assert before != two_ranks.expected()
    kill(engine, 1)
    with caplog.at_level(logging.WARNING):
        assert tokens(engine.generate(prompts(), _GREEDY)) == before
    assert f"was started again with weights of version {version}" in caplog.text
    assert "through the host's memory; links to it are made at the next update" in caplog.text
    assert {c.version for c in engine._replicas[1].ask("generate", prompts(), _GREEDY)} == {version}
    kill(engine, 0)  # while nothing is asked: the update notices it
    version = next(_VERSIONS)
    assert two_ranks.send(engine, version).way == "links"
    assert len(engine.events) == 2
    check(two_ranks, engine, version)

    # What goes wrong on the way is named; the last two leave an engine that refuses to answer.
    source = two_ranks.trainer.weights()
    version = next(_VERSIONS)
    parts = source._parts  # type: ignore[attr-defined]
    source._parts = [[p for p in own if "layers.1.mlp.down_proj" not in p.name] for own in parts]  # type: ignore[attr-defined]
    engine._sink._known = None  # type: ignore[attr-defined]
    with pytest.raises(LayoutError, match=r"holds 0 of .* 'model\.layers\.1\.mlp\.down_proj\.weight'"):
        two_ranks.send(engine, version)
    source._parts = parts  # type: ignore[attr-defined]
    engine._sink._known = None  # type: ignore[attr-defined]
    two_ranks.send(engine, version)
    check(two_ranks, engine, version)

    two_ranks.fault.write_text(json.dumps({"do": "corrupt", "tensor": "0.decoder.layers.0.mlp.linear_fc2.weight"}))
    with pytest.raises(SyncError, match=r"1 weights of version \d+ .* 'model\.layers\.0\.mlp\.down_proj\.weight'"):
        two_ranks.send(engine, next(_VERSIONS))
    with pytest.raises(SyncError, match="interrupted"):
        engine.generate(prompts(), _GREEDY)
    engine.close()


def test_an_engine_of_two_ranks_and_a_bucket_that_is_not_sent(two_ranks: World) -> None:
    engine = two_ranks.engine(tensor=2)
    version = next(_VERSIONS)
    two_ranks.send(engine, version)
    check(two_ranks, engine, version)
    two_ranks.train()
    version = next(_VERSIONS)
    two_ranks.send(engine, version, verify="sampled")
    check(two_ranks, engine, version)

    source = two_ranks.trainer.weights()
    source._timeout_s = 5  # type: ignore[attr-defined]
    engine._sink._known = None  # type: ignore[attr-defined]
    two_ranks.fault.write_text(json.dumps({"do": "send nothing"}))
    with pytest.raises(
        SyncError,
        match=r"a bucket with weights 'model\.embed_tokens\.weight'.* did not come from rank 1 of the trainer",
    ):
        two_ranks.send(engine, next(_VERSIONS))
    source._timeout_s = 300  # type: ignore[attr-defined]
    engine.close()


def test_a_pipeline_sends_too(two_ranks: World) -> None:
    two_ranks.trainer.close()
    two_ranks.trainer = two_ranks.new_trainer(ParallelConfig(pipeline=2))
    engine = two_ranks.engine()
    version = next(_VERSIONS)
    two_ranks.send(engine, version)
    check(two_ranks, engine, version)
    engine.close()


def test_an_engine_killed_after_it_read_the_trainers_memory_reads_it_again(two_ranks: World) -> None:
    """Tensors instead of handles: on CPU they travel. Once the trainer has moved on there is nothing to read again."""
    engine = two_ranks.engine()
    workers = two_ranks.trainer._workers
    source = DirectWorkersSource(workers, partial(SharedMemorySource, workers))
    version = next(_VERSIONS)
    assert synchronise(source, engine.weight_sink(), version=version, verify="full").way == "memory"
    check(two_ranks, engine, version)
    kill(engine, 0)
    check_again = tokens(engine.generate(prompts(), _GREEDY))
    assert check_again == two_ranks.expected()
    assert f"with weights of version {version}" in engine.events[0]
    two_ranks.train()
    kill(engine, 0)
    with pytest.raises(SyncError, match="after the trainer had moved on"):
        engine.generate(prompts(), _GREEDY)
    engine.close()


def test_ways_that_are_not_open_are_refused(two_ranks: World) -> None:
    engine = two_ranks.world.engine(two_ranks.model, EngineConfig(name="transformers", context=64))
    for transport, reason in (("links", "do not send from rank to rank"), ("memory", "cannot read")):
        with pytest.raises(ConfigError, match=reason):
            synchronise(two_ranks.trainer.weights(), engine.weight_sink(), version=1, transport=transport)  # type: ignore[arg-type]
    assert synchronise(two_ranks.trainer.weights(), engine.weight_sink(), version=1).way == "host"
    engine.close()
