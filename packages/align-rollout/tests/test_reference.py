"""The transformers engine keeps the contract and equals Hugging Face's own generate."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from align_core.config import EngineConfig, SamplingConfig
from align_core.conformance import (
    check_async,
    check_change_on_the_way,
    check_generation,
    check_partial,
    check_weight_sink,
)
from align_core.errors import ConfigError
from align_core.types import ParamMeta, Prompt, WeightTensor
from align_rollout.reference import TransformersEngine

pytest.importorskip("transformers")

_CONFIG = EngineConfig(name="transformers", context=256, device="cpu")


class Frozen:
    """The twin's weights of one seed, as they stay when the twin changes."""

    def __init__(self, twin: Any, seed: int) -> None:
        twin.randomise(seed)
        self._weights = list(twin.iterate())

    def metadata(self) -> list[ParamMeta]:
        return [weight.meta for weight in self._weights]

    def iterate(self) -> Iterator[WeightTensor]:
        return iter(self._weights)


@pytest.fixture(scope="module", params=["tied", "untied"])
def twin(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


@pytest.fixture
def engine(twin: Any) -> Iterator[TransformersEngine]:
    engine = TransformersEngine.from_model(twin.path, _CONFIG)
    yield engine
    engine.close()


def test_conforms(engine: TransformersEngine, twin: Any) -> None:
    check_generation(engine, vocab_size=twin.vocab_size, context=256, eos_ids=[twin.eos_id])
    check_async(engine, vocab_size=twin.vocab_size, context=256, eos_ids=[twin.eos_id])
    check_weight_sink(engine, first=Frozen(twin, 1), second=Frozen(twin, 2), vocab_size=twin.vocab_size)


def test_requests_under_way_continue_with_new_weights(engine: TransformersEngine, twin: Any) -> None:
    versions = itertools.count(1)
    check_change_on_the_way(
        engine,
        first=Frozen(twin, 3),
        second=Frozen(twin, 4),
        vocab_size=twin.vocab_size,
        context=64,
        version=next(versions),
    )


def test_goes_on_from_what_another_had_begun(engine: TransformersEngine, twin: Any) -> None:
    check_partial(engine, vocab_size=twin.vocab_size, context=64)


def test_greedy_tokens_and_sampled_logprobs_equal_hugging_face(engine: TransformersEngine, twin: Any) -> None:
    twin.randomise(5)
    sink = engine.weight_sink()
    sink.begin(twin.metadata(), 1)
    sink.load(list(twin.iterate()))
    sink.commit()
    prompt = Prompt(id=0, tokens=np.random.default_rng(0).integers(3, 128, 9).astype(np.int32))
    (greedy,) = engine.generate([prompt], SamplingConfig(max_tokens=12, temperature=0))
    expected = twin.greedy(prompt.tokens, 12)
    assert greedy.tokens.tolist() == expected[: len(greedy.tokens)]
    for completion in engine.generate([prompt], SamplingConfig(n=3, max_tokens=12, temperature=0.7, top_p=0.9)):
        np.testing.assert_allclose(
            completion.logprobs, twin.logprobs(prompt.tokens, completion.tokens), rtol=0, atol=1e-4
        )


def test_tensor_parallelism_is_refused(twin: Any) -> None:
    with pytest.raises(ConfigError, match="runs on one device"):
        TransformersEngine.from_model(twin.path, dataclasses.replace(_CONFIG, tensor=2))
