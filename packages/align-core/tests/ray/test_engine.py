"""Engines over Ray: the contract through processes, replicas, refusals that end nothing, deaths that lose nothing."""

import dataclasses
import logging
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("ray")
pytest.importorskip("align_rollout")

from align_core.config import ClusterConfig, EngineConfig, SamplingConfig
from align_core.conformance import check_async, check_generation, check_partial, check_sleep, check_weight_sink
from align_core.errors import DataError, WorkerError
from align_core.ray import cluster
from align_core.ray.engine import RayEngine
from align_core.ray.world import RayWorld
from align_core.types import Completion, Prompt
from align_rollout import fake

pytestmark = pytest.mark.slow

_VOCAB = 16
_CONFIG = EngineConfig(name="fake", context=64, replicas=2)


def weights(seed: int) -> "fake.ArrayWeights":
    generator = np.random.default_rng(seed)
    return fake.ArrayWeights(
        {
            "bigram.weight": generator.normal(size=(_VOCAB, _VOCAB)).astype(np.float32),
            "bias": generator.normal(size=_VOCAB).astype(np.float32),
        }
    )


@pytest.fixture(scope="module")
def world() -> Iterator[RayWorld]:
    world = RayWorld(ClusterConfig())
    yield world
    world.close()
    cluster.stop()


@pytest.fixture(scope="module")
def engine(world: RayWorld, tmp_path_factory: pytest.TempPathFactory) -> RayEngine:
    model = tmp_path_factory.mktemp("bigram")
    fake.save_bigram(model, weights(0)._weights, eos_id=2)
    engine = world.engine(model, _CONFIG)
    assert isinstance(engine, RayEngine)
    return engine


def test_two_replicas_conform_as_one_engine(engine: RayEngine) -> None:
    check_generation(engine, vocab_size=_VOCAB, context=64, eos_ids=[2])
    check_async(engine, vocab_size=_VOCAB, context=64, eos_ids=[2])
    check_weight_sink(engine, first=weights(1), second=weights(2), vocab_size=_VOCAB)
    check_sleep(engine, weights(3), vocab_size=_VOCAB, version=100)


def test_two_replicas_go_on_from_what_others_had_begun(world: RayWorld, tmp_path: Path) -> None:
    fake.save_bigram(tmp_path, weights(0)._weights, eos_id=_VOCAB + 1)  # so that no completion ends early
    engine = world.engine(tmp_path, dataclasses.replace(_CONFIG, context=4096))
    assert isinstance(engine, RayEngine)
    check_partial(engine, vocab_size=_VOCAB, context=4096)


def test_an_engine_that_is_closed_while_a_thread_waits_for_it_is_not_started_again(
    world: RayWorld, tmp_path: Path
) -> None:
    """As when training fails while the next step is being sampled."""
    fake.save_bigram(tmp_path, weights(0)._weights, eos_id=_VOCAB + 1)
    engine = world.engine(tmp_path, EngineConfig(name="fake", context=100_000))
    assert isinstance(engine, RayEngine)
    with ThreadPoolExecutor(1) as pool:
        processes = engine._replicas[0].workers.processes
        waiting = pool.submit(engine.generate, prompts(9), SamplingConfig(n=9, max_tokens=90_000))
        while processes.usable:  # until it is called
            time.sleep(0.01)
        engine.close()
        with pytest.raises(WorkerError, match="died in ask"):
            waiting.result(60)
    assert engine.events == []


def prompts(count: int) -> list[Prompt]:
    return [Prompt(id=i, tokens=np.array([3 + i % 5, 4], np.int32)) for i in range(count)]


def test_prompts_go_to_the_least_loaded_replica(engine: RayEngine) -> None:
    """A long prompt loads one replica as much as several short ones the other."""
    engine.pause()
    engine.submit(
        [Prompt(id=0, tokens=np.array([3], np.int32), max_tokens=40), *prompts(9)[1:]], SamplingConfig(max_tokens=8)
    )
    homes = {identity: asked.replica.number for identity, asked in engine._asked.items()}
    engine.resume()
    drain(engine, 9)
    assert [number for identity, number in homes.items() if identity].count(1 - homes[0]) >= 4


def test_a_refused_prompt_ends_no_process(engine: RayEngine) -> None:
    for call in (engine.generate, engine.submit):
        with pytest.raises(DataError, match="prompt 7 is empty"):
            call([Prompt(id=7, tokens=np.zeros(0, np.int32))], SamplingConfig(max_tokens=4))
    assert len(engine.generate(prompts(3), SamplingConfig(max_tokens=4))) == 3
    assert engine.events == []


def test_a_killed_replica_comes_back_with_the_current_weights(
    engine: RayEngine, caplog: pytest.LogCaptureFixture
) -> None:
    sink = engine.weight_sink()
    source = weights(9)
    sink.begin(source.metadata(), 200)
    sink.load(list(source.iterate()))
    sink.commit()
    sampling = SamplingConfig(n=2, max_tokens=20, seed=4)
    expected = keys_and_tokens(engine.generate(prompts(8), sampling))
    engine.pause()
    engine.submit(prompts(8), sampling)
    kill(engine, 1)
    with caplog.at_level(logging.WARNING):
        engine.resume()
        found = drain(engine, 16)
    assert keys_and_tokens(found) == expected
    assert {completion.version for completion in found} == {200}
    assert len(engine.events) == 1
    assert "replica 1 died and was started again with weights of version 200; 8 unfinished" in engine.events[0]
    assert engine.events[0] in caplog.text
    kill(engine, 0)
    assert keys_and_tokens(engine.generate(prompts(8), sampling)) == expected


def kill(engine: RayEngine, replica: int) -> None:
    os.kill(engine._replicas[replica].workers.processes.whereabouts[0].pid, signal.SIGKILL)


def drain(engine: RayEngine, count: int) -> list[Completion]:
    found: list[Completion] = []
    while len(found) < count:
        found += engine.poll(30)
    return found


def keys_and_tokens(completions: list[Completion]) -> dict[tuple[int, int], list[int]]:
    found = {(c.prompt_id, c.sample): c.tokens.tolist() for c in completions}
    assert len(found) == len(completions)
    return found


def test_vllm_killed_while_it_generates_loses_and_repeats_nothing(world: RayWorld, tmp_path: Path) -> None:
    """kill -9 after the first completions have come; the rest comes from a new process, each once."""
    pytest.importorskip("vllm")
    from align_core.tutorial.tiny import make_tiny_model

    make_tiny_model(tmp_path / "model", seed=1)
    config = EngineConfig(context=256, kv_cache_mib=32, max_sequences=8)
    engine = world.engine(tmp_path / "model", config)
    assert isinstance(engine, RayEngine)
    asked = [Prompt(id=i, tokens=np.array([5, 6 + i], np.int32)) for i in range(24)]
    sampling = SamplingConfig(n=2, max_tokens=200, seed=3)
    for _ in range(3):  # where this process was held up, all may have ended before it looked
        engine.submit(asked, sampling)
        found = engine.poll(60)
        if len(found) < 48:
            break
    assert 0 < len(found) < 48
    kill(engine, 0)
    found += drain(engine, 48 - len(found))
    assert engine.poll(0.5) == []
    assert len(engine.events) == 1
    expected = keys_and_tokens(engine.generate(asked, sampling))
    assert keys_and_tokens(found).keys() == expected.keys()
