"""Weights reach the engine whole or not at all, and the canary's three numbers are right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig, SamplingConfig, TrainerConfig
from align_core.errors import SyncError
from align_core.stages import sync
from align_core.stages.sync import check_versions, compare_logprobs, synchronise
from align_core.types import Completion, Prompt

PROMPTS = [Prompt(id=0, tokens=np.array([1, 2, 3], np.int32))]


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 30])
def test_engine_answers_with_the_trainers_weights_under_the_version(
    tiny_model: Any, fake_world: Callable[..., Any], chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sync, "_CHUNK_BYTES", chunk_bytes)
    world = fake_world()
    trainer, engine = world.trainer(TrainerConfig(model=tiny_model)), world.engine(tiny_model, EngineConfig())
    trainer.weight["bias"][77] = 50.0
    synchronise(trainer.weights(), engine.weight_sink(), version=5)
    (completion,) = engine.generate(PROMPTS, SamplingConfig(max_tokens=3))
    assert completion.tokens.tolist() == [77, 77, 77]
    assert completion.version == 5


def test_damaged_weight_is_named_and_the_engine_keeps_the_old_ones(
    tiny_model: Any, fake_world: Callable[..., Any]
) -> None:
    world = fake_world(damages_weights=True)
    trainer, engine = world.trainer(TrainerConfig(model=tiny_model)), world.engine(tiny_model, EngineConfig())
    before = engine.generate(PROMPTS, SamplingConfig(max_tokens=3))[0].tokens.tolist()
    trainer.weight["bias"][77] = 50.0
    with pytest.raises(SyncError, match=r"'bias' .*checksum"):
        synchronise(trainer.weights(), engine.weight_sink(), version=1)
    after = engine.generate(PROMPTS, SamplingConfig(max_tokens=3))[0]
    assert (after.tokens.tolist(), after.version) == (before, 0)


def test_weight_of_another_shape_is_named(tiny_model: Any, fake_world: Callable[..., Any]) -> None:
    world = fake_world()
    trainer, engine = world.trainer(TrainerConfig(model=tiny_model)), world.engine(tiny_model, EngineConfig())
    trainer.weight["bias"] = trainer.weight["bias"][:-1]
    with pytest.raises(SyncError, match="'bias'"):
        synchronise(trainer.weights(), engine.weight_sink(), version=1)


def test_canary_by_hand() -> None:
    """Differences 0, 0.1, 0.2 and 0.1: mean 0.1, largest 0.2; 0.99 of the way to place 3 is 2.97: 0.1 + 0.97 * 0.1."""
    engine = np.array([-1.0, -2.0, -3.0, -4.0], np.float32)
    trainer = np.array([-1.0, -2.1, -2.8, -4.1], np.float32)
    canary = compare_logprobs(engine, trainer, threshold=0.11, version=3)
    assert (canary.mean, canary.p99, canary.max) == pytest.approx((0.1, 0.197, 0.2), abs=1e-6)


def test_canary_beyond_the_threshold_stops() -> None:
    engine, trainer = np.array([-1.0, -2.0], np.float32), np.array([-1.0, -2.5], np.float32)
    message = (
        r"2 tokens sampled by weight version 3: mean 0.25, p99 0.495, max 0.5 nats, allowed mean 0.2; use the same"
    )
    with pytest.raises(SyncError, match=message):
        compare_logprobs(engine, trainer, threshold=0.2, version=3)
    compare_logprobs(engine, trainer, threshold=0.25, version=3)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_canary_that_is_not_finite_stops(bad: float) -> None:
    """Both infinite would have no difference; either alone has an infinite one."""
    good, broken = np.array([-1.0, -2.0], np.float32), np.array([-1.0, bad], np.float32)
    for engine, trainer in ((good, broken), (broken, good), (broken, broken)):
        with pytest.raises(SyncError, match="1 of 2 log-probs of tokens sampled by weight version 3 are not finite"):
            compare_logprobs(engine, trainer, threshold=1e9, version=3)


def test_stale_completions_are_refused() -> None:
    fresh = Completion(
        prompt_id=0,
        sample=0,
        tokens=np.array([5], np.int32),
        logprobs=np.zeros(1, np.float32),
        finish_reason="stop",
        version=3,
    )
    check_versions([fresh, fresh], version=3)
    with pytest.raises(SyncError, match=r"sampled with weight versions \[2\] after version 3 was committed"):
        check_versions([fresh, replace(fresh, version=2)], version=3)
