"""The transformers engine keeps the contract and equals Hugging Face's own generate."""

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
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
from align_core.types import ParamMeta, Prompt, WeightTensor, checksum
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


def test_a_mixture_of_experts_takes_new_weights_under_a_checkpoints_names(tmp_path: Path) -> None:
    """transformers keeps a layer's experts in one tensor, checkpoints and trainers each expert's three."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    load_file = pytest.importorskip("safetensors.numpy").load_file
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            max_position_embeddings=256,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
            sliding_window=None,
        )
        made.append(MixtralForCausalLM(config).float().eval())
    first, second = made
    first.save_pretrained(tmp_path / "first")
    second.save_pretrained(tmp_path / "second")
    stored = load_file(tmp_path / "second" / "model.safetensors")
    engine = TransformersEngine.from_model(tmp_path / "first", EngineConfig(context=64, device="cpu"))
    metas = [ParamMeta(name=name, shape=value.shape, dtype="float32") for name, value in stored.items()]
    assert any(".experts.3.w2." in meta.name for meta in metas)
    sink = engine.weight_sink()
    sink.begin(metas, 1)
    for meta in metas:
        data = np.ascontiguousarray(stored[meta.name]).reshape(-1).view(np.uint8)
        sink.load([WeightTensor(meta=meta, checksum=checksum(data, item_bytes=4), data=data)])
    sink.commit()
    prompt = np.arange(5, 12, dtype=np.int32)
    (found,) = engine.generate([Prompt(id=0, tokens=prompt)], SamplingConfig(n=1, max_tokens=12, temperature=0.0))
    ids = torch.from_numpy(prompt[None].astype(np.int64))
    expected = second.generate(ids, max_new_tokens=len(found.tokens), do_sample=False, pad_token_id=0)
    assert found.tokens.tolist() == expected[0, len(prompt) :].tolist()
    engine.close()


def test_vllm_on_cpu_refuses_new_weights_of_experts() -> None:
    from align_rollout.weights import VllmWeightSink

    expert = ParamMeta(name="model.layers.0.mlp.experts.0.up_proj.weight", shape=(4, 4), dtype="float32")
    sink = VllmWeightSink(llm=object(), expected=[expert], loaded=True, in_process=True)
    with pytest.raises(ConfigError, match=r"cannot take new weights for it; set engine\.name to 'transformers'"):
        sink.begin([expert], 1)
    assert sink.devices() == frozenset()
