"""The fake engine keeps the whole contract, and its numbers are those of a bigram model."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from align_core.config import EngineConfig, SamplingConfig
from align_core.conformance import (
    check_async,
    check_change_on_the_way,
    check_engine,
    check_partial,
    check_sleep,
    check_weight_sink,
    check_weight_source,
)
from align_core.errors import CheckpointError, SyncError
from align_core.types import ITEM_BYTES, ParamMeta, Prompt, WeightTensor, checksum
from align_rollout.fake import ArrayWeights, FakeEngine, save_bigram

_VOCAB = 16
_EOS = 2


def _weights(seed: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {
        "bigram.weight": generator.normal(size=(_VOCAB, _VOCAB)).astype(np.float32),
        "bias": generator.normal(size=_VOCAB).astype(np.float32),
    }


def _prompt(last: int) -> Prompt:
    return Prompt(id=1, tokens=np.array([0, last], np.int32))


def test_fake_engine_conforms() -> None:
    check_engine(
        lambda: FakeEngine(weights=_weights(0), eos_ids=[_EOS], context=64),
        vocab_size=_VOCAB,
        context=64,
        eos_ids=[_EOS],
    )


def test_fake_sink_conforms() -> None:
    engine = FakeEngine(weights=_weights(0), context=64)
    first, second = ArrayWeights(_weights(1)), ArrayWeights(_weights(2))
    check_weight_sink(engine, first=first, second=second, vocab_size=_VOCAB)


def test_fake_engine_samples_in_the_background() -> None:
    engine = FakeEngine(weights=_weights(0), eos_ids=[_EOS], context=64)
    check_async(engine, vocab_size=_VOCAB, context=64, eos_ids=[_EOS])
    engine.close()


def test_fake_engine_continues_paused_requests_with_new_weights() -> None:
    engine = FakeEngine(weights=_weights(0), context=4096)
    first, second = ArrayWeights(_weights(1)), ArrayWeights(_weights(2))
    check_change_on_the_way(engine, first=first, second=second, vocab_size=_VOCAB, context=4096)
    engine.close()


def test_fake_engine_goes_on_from_what_another_had_begun() -> None:
    engine = FakeEngine(weights=_weights(0), context=4096)
    check_partial(engine, vocab_size=_VOCAB, context=4096)
    engine.close()


def test_fake_engine_sleeps() -> None:
    check_sleep(FakeEngine(weights=_weights(0), context=64), ArrayWeights(_weights(1)), vocab_size=_VOCAB)


def test_array_weights_conform() -> None:
    check_weight_source(ArrayWeights(_weights(3)))


def test_logprob_is_that_of_the_bigram() -> None:
    """Two tokens, logits (0, log 3) after token 0: p = (1/4, 3/4); greedy takes token 1 at log 0.75."""
    weights = {"bigram.weight": np.array([[0, 0], [0, 0]], np.float32), "bias": np.array([0, np.log(3)], np.float32)}
    engine = FakeEngine(weights=weights)
    prompt = Prompt(id=0, tokens=np.zeros(1, np.int32))
    (completion,) = engine.generate([prompt], SamplingConfig(max_tokens=2, temperature=0))
    assert completion.tokens.tolist() == [1, 1]
    np.testing.assert_allclose(completion.logprobs, np.log([0.75, 0.75]), rtol=1e-6)


def test_samples_follow_the_distribution() -> None:
    """p(1) = 3/4: of 2000 samples 1500 are expected, with standard deviation sqrt(2000 * 3/16) = 19.4."""
    weights = {"bigram.weight": np.zeros((2, 2), np.float32), "bias": np.array([0, np.log(3)], np.float32)}
    engine = FakeEngine(weights=weights)
    prompt = Prompt(id=0, tokens=np.zeros(1, np.int32))
    completions = engine.generate([prompt], SamplingConfig(n=2000, max_tokens=1))
    assert abs(sum(int(c.tokens[0]) for c in completions) - 1500) < 4 * 19.4


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """p = (0.25, 0.75): top_p 0.7 leaves token 1 alone, and its log-prob stays that of the full distribution."""
    weights = {"bigram.weight": np.zeros((2, 2), np.float32), "bias": np.array([0, np.log(3)], np.float32)}
    engine = FakeEngine(weights=weights)
    prompt = Prompt(id=0, tokens=np.zeros(1, np.int32))
    completions = engine.generate([prompt], SamplingConfig(n=50, max_tokens=1, top_p=0.7))
    assert {int(c.tokens[0]) for c in completions} == {1}
    assert completions[0].logprobs[0] == pytest.approx(np.log(0.75))


def test_eos_ends_a_completion_and_is_kept() -> None:
    weights = {"bigram.weight": np.zeros((4, 4), np.float32), "bias": np.array([0, 0, 50, 0], np.float32)}
    engine = FakeEngine(weights=weights, eos_ids=[2])
    (completion,) = engine.generate([_prompt(1)], SamplingConfig(max_tokens=5))
    assert completion.tokens.tolist() == [2]
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sink_converts_half_precision(dtype: str) -> None:
    """1.5 is exact in both half formats: 0x3fc0 in bfloat16, 0x3e00 in float16."""
    engine = FakeEngine(weights={"bigram.weight": np.zeros((1, 1), np.float32), "bias": np.zeros(1, np.float32)})
    bits = {"bfloat16": 0x3FC0, "float16": 0x3E00}[dtype]
    sink = engine.weight_sink()
    weights = [_half(name, shape, bits, dtype) for name, shape in (("bigram.weight", (1, 1)), ("bias", (1,)))]
    sink.begin([weight.meta for weight in weights], 1)
    sink.load(weights)
    sink.commit()
    assert engine._sink.weights["bigram.weight"].tolist() == [[1.5]]


def _half(name: str, shape: tuple[int, ...], bits: int, dtype: str) -> WeightTensor:
    data = np.array([bits], np.uint16).view(np.uint8)
    meta = ParamMeta(name=name, shape=shape, dtype=dtype)  # type: ignore[arg-type]
    return WeightTensor(meta=meta, checksum=checksum(data, item_bytes=ITEM_BYTES[dtype]), data=data)


def test_from_model_reads_what_save_bigram_wrote(tmp_path: Path) -> None:
    save_bigram(tmp_path, _weights(4), eos_id=_EOS)
    loaded = FakeEngine.from_model(tmp_path, EngineConfig(context=32))
    direct = FakeEngine(weights=_weights(4), eos_ids=[_EOS], context=32)
    sampling = SamplingConfig(n=4, max_tokens=6)
    ours, theirs = loaded.generate([_prompt(3)], sampling), direct.generate([_prompt(3)], sampling)
    assert [c.tokens.tolist() for c in ours] == [c.tokens.tolist() for c in theirs]


def test_from_model_without_weights_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has no bigram\.npz"):
        FakeEngine.from_model(tmp_path, EngineConfig())


def test_closed_engine_refuses() -> None:
    engine = FakeEngine(weights=_weights(0))
    engine.close()
    with pytest.raises(SyncError, match="closed"):
        engine.generate([_prompt(3)], SamplingConfig())
