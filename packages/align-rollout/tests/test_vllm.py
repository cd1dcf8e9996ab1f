"""vLLM as an engine: the contract, and Hugging Face's tokens and log-probs, before and after weight updates.

A real engine starts in 10 to 15 s, so one serves all tests of a model; a test that needs certain weights sends them.
"""

import dataclasses
import itertools
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
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
    check_sleep,
    check_weight_sink,
)
from align_core.contracts import WeightSource
from align_core.errors import ConfigError, DataError, SyncError
from align_core.types import Completion, ParamMeta, Prompt, WeightTensor, checksum
from align_rollout.vllm import VllmEngine

pytest.importorskip("vllm", reason="vLLM is not installed")

_CONFIG = EngineConfig(context=256, kv_cache_mib=32, max_sequences=64, device="cpu")
_GREEDY = SamplingConfig(max_tokens=16, temperature=0)


@dataclasses.dataclass(kw_only=True)
class _Pair:
    """An engine and the Hugging Face model whose weights it holds, or gets with `send`."""

    twin: Any
    engine: VllmEngine
    versions: Iterator[int]

    def send(self) -> int:
        version = next(self.versions)
        sink = self.engine.weight_sink()
        sink.begin(self.twin.metadata(), version)
        for weight in self.twin.iterate():
            sink.load([weight])
        sink.commit()
        return version


@pytest.fixture(scope="module", params=["tied", "untied"])
def pair(request: pytest.FixtureRequest) -> Iterator[_Pair]:
    twin = request.getfixturevalue(request.param)
    engine = VllmEngine.from_model(twin.path, _CONFIG)
    yield _Pair(twin=twin, engine=engine, versions=itertools.count(1))
    engine.close()
    engine.close()


def _prompts() -> list[Prompt]:
    """The last fills more than one block of the KV cache (128 tokens on CPU), so a stale prefix cache would show."""
    generator = np.random.default_rng(0)
    return [
        Prompt(id=i, tokens=generator.integers(3, 128, size=length).astype(np.int32))
        for i, length in enumerate((1, 5, 8, 200))
    ]


def _until_eos(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


def _assert_equals_hugging_face(pair: _Pair, completions: list[Completion]) -> None:
    for prompt, completion in zip(_prompts(), completions, strict=True):
        expected = pair.twin.greedy(prompt.tokens, _GREEDY.max_tokens)
        assert completion.tokens.tolist() == _until_eos(expected, pair.twin.eos_id)
        np.testing.assert_allclose(
            completion.logprobs, pair.twin.logprobs(prompt.tokens, completion.tokens), rtol=0, atol=1e-4
        )


def test_greedy_tokens_and_logprobs_equal_hugging_face_as_loaded(pair: _Pair) -> None:
    """First in the file: later tests replace the weights that the engine read from disk."""
    completions = pair.engine.generate(_prompts(), _GREEDY)
    assert {completion.version for completion in completions} == {0}
    _assert_equals_hugging_face(pair, completions)


def test_generation_conforms(pair: _Pair) -> None:
    check_generation(pair.engine, vocab_size=pair.twin.vocab_size, context=256, eos_ids=[pair.twin.eos_id])


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_after_an_update_everything_equals_hugging_face_on_the_new_weights(pair: _Pair, seed: int) -> None:
    pair.twin.randomise(seed)
    version = pair.send()
    completions = pair.engine.generate(_prompts(), _GREEDY)
    assert {completion.version for completion in completions} == {version}
    _assert_equals_hugging_face(pair, completions)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_logprobs_are_those_at_temperature_one(pair: _Pair, temperature: float) -> None:
    pair.twin.randomise(7)
    pair.send()
    sampling = SamplingConfig(n=3, max_tokens=12, temperature=temperature, top_p=0.95)
    prompts = {prompt.id: prompt.tokens for prompt in _prompts()}
    for completion in pair.engine.generate(_prompts(), sampling):
        expected = pair.twin.logprobs(prompts[completion.prompt_id], completion.tokens)
        np.testing.assert_allclose(completion.logprobs, expected, rtol=0, atol=1e-4)


def test_weight_sink_conforms(pair: _Pair) -> None:
    first, second = (_frozen(pair, seed) for seed in (11, 12))
    version = next(pair.versions) + 100
    pair.versions = itertools.count(version + 10)
    check_weight_sink(pair.engine, first=first, second=second, vocab_size=128, version=version)


def _frozen(pair: _Pair, seed: int) -> WeightSource:
    """The twin's weights for `seed`, as they stay when the twin changes."""
    pair.twin.randomise(seed)
    weights = list(pair.twin.iterate())

    class Frozen:
        def metadata(self) -> list[ParamMeta]:
            return [weight.meta for weight in weights]

        def iterate(self) -> Iterator[WeightTensor]:
            return iter(weights)

    return Frozen()


def test_samples_in_the_background(pair: _Pair) -> None:
    check_async(pair.engine, vocab_size=pair.twin.vocab_size, context=256, eos_ids=[pair.twin.eos_id])


def test_sleeps(pair: _Pair) -> None:
    """On CPU nothing is freed; what it refuses and when is the same as on a GPU."""
    version = next(pair.versions) + 100
    pair.versions = itertools.count(version + 10)
    check_sleep(pair.engine, _frozen(pair, 21), vocab_size=128, version=version)


def test_requests_under_way_continue_with_new_weights(pair: _Pair) -> None:
    """Their keys and values are computed again: what they say from then on is the new weights' answer to all before."""
    version = next(pair.versions) + 100
    pair.versions = itertools.count(version + 30)
    first, second = (_without_end(_frozen(pair, seed), pair) for seed in (31, 32))
    check_change_on_the_way(
        pair.engine, first=first, second=second, vocab_size=128, context=256, version=version, tolerance=1e-4
    )


def test_goes_on_from_what_another_had_begun(pair: _Pair) -> None:
    """With the weights of the test before, by which no completion ends early."""
    check_partial(pair.engine, vocab_size=128, context=256)


def _without_end(source: WeightSource, pair: _Pair) -> WeightSource:
    """The same weights, but no completion ends before its limit: the end-of-sequence token has the logit of zeros."""
    weights = []
    head = "model.embed_tokens.weight" if pair.twin.tied else "lm_head.weight"
    for weight in source.iterate():
        data = np.array(weight.bytes())
        if weight.meta.name == head:
            data.view(np.float32).reshape(weight.meta.shape)[pair.twin.eos_id] = 0
        weights.append(dataclasses.replace(weight, data=data, checksum=checksum(data, item_bytes=4)))

    class Endless:
        def metadata(self) -> list[ParamMeta]:
            return [weight.meta for weight in weights]

        def iterate(self) -> Iterator[WeightTensor]:
            return iter(weights)

    return Endless()


@pytest.mark.parametrize(("policy", "reason"), [("drain", "length"), ("abort", "abort"), ("continue", "length")])
def test_policy_for_requests_under_way(pair: _Pair, policy: str, reason: str) -> None:
    """What new weights do to a request that is not paused."""
    pair.twin.randomise(41)
    pair.send()
    endless = _without_end(_frozen(pair, 41), pair)
    engine, stream = pair.engine, pair.engine._stream

    def hold() -> None:
        """Before the second weights: a request has some of its tokens when they come, however busy the machine is."""
        if engine._sink.version == old:  # type: ignore[attr-defined]
            with stream._entered():  # so the engine's thread takes no step
                prompt = Prompt(id=0, tokens=np.array([5, 6], np.int32))
                engine.submit([prompt], SamplingConfig(max_tokens=250, temperature=0))
                for _ in range(3):
                    stream._step()
                stream.hold(policy)  # type: ignore[arg-type]

    old = next(pair.versions)
    engine._sink._hold = hold  # type: ignore[attr-defined]
    for source, version in ((endless, old), (_without_end(_frozen(pair, 42), pair), next(pair.versions))):
        sink = engine.weight_sink()
        sink.begin(source.metadata(), version)
        sink.load(list(source.iterate()))
        sink.commit()
    (long,) = engine.poll(60)
    assert long.finish_reason == reason
    assert long.version == old
    assert len(long.tokens) == 250 or policy == "abort"
    assert (long.versions is not None) == (policy == "continue")


def test_bfloat16_weights_are_converted_to_the_engines_dtype(pair: _Pair) -> None:
    """Weights cut to bfloat16 on the way give the answers of a model whose weights were cut so."""
    import torch

    pair.twin.randomise(5)
    with torch.no_grad():
        for parameter in pair.twin.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    weights = [_as_bfloat16(weight) for weight in pair.twin.iterate()]
    sink = pair.engine.weight_sink()
    sink.begin([weight.meta for weight in weights], next(pair.versions))
    sink.load(weights)
    sink.commit()
    _assert_equals_hugging_face(pair, pair.engine.generate(_prompts(), _GREEDY))


def _as_bfloat16(weight: WeightTensor) -> WeightTensor:
    data = np.ascontiguousarray(weight.bytes().view(np.uint16)[1::2]).view(np.uint8)
    meta = dataclasses.replace(weight.meta, dtype="bfloat16")
    return WeightTensor(meta=meta, checksum=checksum(data, item_bytes=2), data=data)


def _with_meta(weight: WeightTensor, **changes: Any) -> WeightTensor:
    return dataclasses.replace(weight, meta=dataclasses.replace(weight.meta, **changes))


def _tied_head(meta: ParamMeta) -> ParamMeta:
    return dataclasses.replace(meta, name="lm_head.weight")


def test_a_tied_model_takes_no_second_copy_of_its_embedding(pair: _Pair) -> None:
    """It would be ignored, silently, if it differed from the embedding."""
    if not pair.twin.tied:
        pytest.skip("the model is not tied")
    metadata = pair.twin.metadata()
    with pytest.raises(SyncError, match=r"not in the engine's model: 'lm_head\.weight'"):
        pair.engine.weight_sink().begin([*metadata, _tied_head(metadata[0])], next(pair.versions))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w: _with_meta(w, name="model.what"), "was not announced"),
        (lambda w: _with_meta(w, dtype="bfloat16"), "was announced as float32"),
        (lambda w: _with_meta(w, shape=w.meta.shape[::-1]), "but was announced as float32"),
        (lambda w: dataclasses.replace(w, data=w.bytes()[:-4]), r"came with .* bytes; its shape needs"),
        (lambda w: dataclasses.replace(w, checksum=w.checksum ^ 1), "was damaged on its way"),
    ],
    ids=["unannounced", "other dtype", "other shape", "truncated", "other checksum"],
)
def test_a_spoilt_tensor_is_refused_and_named(
    pair: _Pair, spoil: Callable[[WeightTensor], WeightTensor], message: str
) -> None:
    weights = list(pair.twin.iterate())
    sink = pair.engine.weight_sink()
    sink.begin(pair.twin.metadata(), next(pair.versions))
    spoilt = spoil(weights[0])
    with pytest.raises(SyncError, match=message) as refusal:
        sink.load([spoilt])
    assert repr(spoilt.meta.name) in str(refusal.value)
    with pytest.raises(SyncError, match="never came"):
        sink.commit()


def test_a_weight_that_comes_twice_is_refused(pair: _Pair) -> None:
    weights = list(pair.twin.iterate())
    sink = pair.engine.weight_sink()
    sink.begin(pair.twin.metadata(), next(pair.versions))
    with pytest.raises(SyncError, match="came twice"):
        sink.load([weights[0], weights[0]])


def test_a_token_outside_the_vocabulary_is_refused(pair: _Pair) -> None:
    with pytest.raises(DataError, match=r"prompt 3 has token id 128, .* 0 \.\. 127"):
        pair.engine.generate([Prompt(id=3, tokens=np.array([5, 128], np.int32))], _GREEDY)


def _crowd() -> list[Prompt]:
    generator = np.random.default_rng(1)
    return [Prompt(id=i, tokens=generator.integers(3, 128, size=150).astype(np.int32)) for i in range(64)]


def test_more_prompts_than_one_pass_takes_are_sampled_as_they_are_alone(pair: _Pair) -> None:
    """64 x 150 = 9600 tokens of prompts; a pass takes 8192. A prompt cut over two passes would break its seed."""
    crowd, sampling = _crowd(), SamplingConfig(max_tokens=4, seed=3)
    completions = pair.engine.generate(crowd, sampling)
    for i in (0, 31, 54, 63):
        (alone,) = pair.engine.generate([crowd[i]], sampling)
        assert alone.tokens.tolist() == completions[i].tokens.tolist()


def test_requests_that_vllm_preempts_are_sampled_as_they_are_alone(tied: Any) -> None:
    """1 MiB of KV cache is 8 blocks of 128 tokens, for 8 prompts of 100; each then grows into a second block."""
    config = dataclasses.replace(_CONFIG, kv_cache_mib=1)
    crowd, sampling = _crowd(), SamplingConfig(max_tokens=80, seed=3)
    short = [Prompt(id=prompt.id, tokens=prompt.tokens[:100]) for prompt in crowd]
    engine = VllmEngine.from_model(tied.path, config)
    try:
        completions = engine.generate(short, sampling)
        for i in (0, 5, 6, 7, 8, 63):
            (alone,) = engine.generate([short[i]], sampling)
            assert alone.tokens.tolist() == completions[i].tokens.tolist()
    finally:
        engine.close()


def test_starting_leaves_the_process_as_it_was(tied: Any) -> None:
    """vLLM reseeds every generator, sets LD_PRELOAD for children and disables torch.set_num_threads; we undo it."""
    import os
    import random

    import torch

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    preload, set_num_threads = os.environ.get("LD_PRELOAD"), torch.set_num_threads
    engine = VllmEngine.from_model(tied.path, _CONFIG)
    try:
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
        assert os.environ.get("LD_PRELOAD") == preload
        assert torch.set_num_threads is set_num_threads
    finally:
        engine.close()
    with pytest.raises(SyncError, match="closed"):
        engine.generate(_prompts(), _GREEDY)


def test_a_closed_engine_keeps_nothing_of_the_model(tied: Any) -> None:
    """Else the next engine of the process finds no memory, and with sleep mode vLLM refuses to start it."""
    engine = VllmEngine.from_model(tied.path, _CONFIG)
    engine.generate(_prompts(), _GREEDY)
    llm = weakref.ref(engine._llm)
    models = [weakref.ref(model) for model in engine._llm.apply_model(lambda model: model)]
    engine.close()
    assert llm() is None
    assert [model() for model in models] == [None]


def test_a_directory_without_weights_waits_for_its_first_ones(untied: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((untied.path / "config.json").read_bytes())
    engine = VllmEngine.from_model(tmp_path, _CONFIG)
    try:
        with pytest.raises(SyncError, match=r"without \*\.safetensors and has got no weights yet"):
            engine.generate(_prompts(), _GREEDY)
        untied.randomise(3)
        filled = _Pair(twin=untied, engine=engine, versions=itertools.count(0))
        assert filled.send() == 0
        _assert_equals_hugging_face(filled, engine.generate(_prompts(), _GREEDY))
    finally:
        engine.close()


def test_cuda_without_a_device_is_refused(tied: Any) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        VllmEngine.from_model(tied.path, dataclasses.replace(_CONFIG, device="cuda"))


@pytest.mark.slow
def test_two_tensor_parallel_workers_answer_like_hugging_face(tied: Any, tmp_path: Path) -> None:
    """Workers are processes here, so weights given as arrays reach them through a file."""
    tied.randomise(21)
    engine = VllmEngine.from_model(tied.path, dataclasses.replace(_CONFIG, tensor=2))
    try:
        two = _Pair(twin=tied, engine=engine, versions=itertools.count(1))
        two.send()
        _assert_equals_hugging_face(two, engine.generate(_prompts(), _GREEDY))
        first, second = _frozen(two, 22), _frozen(two, 23)
        check_weight_sink(engine, first=first, second=second, vocab_size=128, version=2)
    finally:
        engine.close()


def test_preload_imports_vllm_and_starts_nothing() -> None:
    """In a fresh process, as a world does it while models are loaded."""
    code = (
        "import sys; from align_core.config import EngineConfig; from align_rollout.vllm import VllmEngine\n"
        "VllmEngine.preload(EngineConfig(device='cpu'))\n"
        "from torch import distributed\n"
        "print('vllm.entrypoints.llm' in sys.modules, distributed.is_initialized())"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.split()[-2:] == ["True", "False"]
