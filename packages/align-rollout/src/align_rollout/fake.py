"""A rollout engine without vLLM, for tests of stages: a bigram model in numpy, exact and instant.

logits(next | last) = bigram.weight[last] + bias. It keeps the whole contract, weight updates included, so a stage that
works with it works with vLLM; and since the model is real, a fake trainer on the same two weights can learn.
Shape letters: V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.config import EngineConfig, InFlight, SamplingConfig
from align_core.contracts import (
    RolloutEngine,
    SupportsAsyncGenerate,
    SupportsPartial,
    SupportsSleep,
    SupportsTokenStream,
    WeightSink,
    WeightSource,
)
from align_core.errors import CheckpointError, SyncError
from align_core.stop_ids import read_eos_ids
from align_core.types import ParamMeta, Prompt, WeightChunk, WeightTensor, checksum
from align_rollout.checkpoint import read_config
from align_rollout.sampling import check_prompts
from align_rollout.stream import Delta, Request, Stream, Streamed, no_decoder
from align_rollout.update import PendingUpdate, check_version

Weights = Mapping[str, NDArray[np.float32]]
_FILE = "bigram.npz"


class FakeEngine(Streamed):
    """A `RolloutEngine` on a bigram model, which also samples in the background and sleeps."""

    def __init__(
        self,
        *,
        weights: Weights,
        eos_ids: Collection[int] = (),
        context: int = 2048,
        in_flight: InFlight = "drain",
        decode: Callable[[Sequence[int]], str] | None = None,
    ) -> None:
        """An engine on `weights`, float32 `bigram.weight` [V, V] and `bias` [V]; they are version 0.

        Args:
            decode: from token ids to text, for stop texts.
        """
        self._stream = Stream(
            _BigramStepper(lambda: self._sink.weights, frozenset(eos_ids)),
            check=self._check,
            version=lambda: self._sink.version,
            decode=(lambda: decode) if decode else no_decoder,
        )
        self._sink = _FakeSink(weights, hold=partial(self._stream.hold, in_flight), release=self._stream.release)
        self._context = context
        self._closed = False

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "FakeEngine":
        """An engine on a directory with `bigram.npz` (the two weights) and config.json (for eos_token_id)."""
        read_config(model)
        file = model / _FILE
        if not file.is_file():
            raise CheckpointError(f"{str(model)!r} has no {_FILE}, which the fake engine needs")
        with np.load(file, allow_pickle=False) as arrays:
            weights = {name: np.asarray(arrays[name], dtype=np.float32) for name in arrays.files}
        return cls(
            weights=weights,
            eos_ids=read_eos_ids(model),
            context=config.context,
            in_flight=config.in_flight,
        )

    def sleep(self, *, keep_weights: bool = True) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._stream.abort()
        self._sink.asleep, self._sink.lost = True, self._sink.lost or not keep_weights

    def wake(self) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._sink.asleep = False

    def weight_sink(self) -> WeightSink:
        """The one sink of this engine."""
        return self._sink

    def close(self) -> None:
        """Refuses to generate from now on."""
        self._closed = True
        self._stream.close()

    def _check(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        if self._closed:
            raise SyncError("the engine cannot be used: it is closed; start another")
        if self._sink.asleep:
            raise SyncError("the engine is asleep; call wake() before it generates")
        if self._sink.lost:
            raise SyncError("the engine slept without keeping its weights and has got no new ones; send them first")
        check_prompts(prompts, sampling, context=self._context, vocab_size=len(self._sink.weights["bias"]))


class _BigramStepper:
    """One token a request a step."""

    def __init__(self, weights: Callable[[], Weights], eos_ids: Collection[int]) -> None:
        self._weights = weights
        self._eos_ids = eos_ids
        self._running: dict[str, _Sampler] = {}

    def add(self, request: Request) -> None:
        self._running[request.key] = _Sampler(request, eos_ids={*self._eos_ids, *request.sampling.stop_tokens})

    def step(self) -> list[Delta]:
        weights = self._weights()
        logits_VV = weights["bigram.weight"] + weights["bias"]
        deltas = [sampler.step(logits_VV) for sampler in self._running.values()]
        self.abort([delta.key for delta in deltas if delta.finish_reason])
        return deltas

    def abort(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._running.pop(key, None)


class _Sampler:
    """One request."""

    def __init__(self, request: Request, *, eos_ids: Collection[int]) -> None:
        self._request, self._eos_ids = request, eos_ids
        self._generator = np.random.default_rng(request.seed)
        self._last, self._length = int(request.tokens[-1]), 0

    def step(self, logits_VV: NDArray[np.float32]) -> Delta:
        logits_V = logits_VV[self._last].astype(np.float64)
        self._last = _draw(logits_V, self._request.sampling, self._generator)
        self._length += 1
        ended = self._last in self._eos_ids
        full = self._length == self._request.max_tokens
        return Delta(
            key=self._request.key,
            tokens=[self._last],
            logprobs=[float(_log_softmax(logits_V)[self._last])],
            finish_reason="stop" if ended else "length" if full else None,
        )


class _FakeSink:
    def __init__(self, weights: Weights, *, hold: Callable[[], None], release: Callable[[], None]) -> None:
        self.version = 0
        self.asleep = self.lost = False
        self._hold, self._release = hold, release
        self.weights: dict[str, NDArray[np.float32]] = {name: np.array(array) for name, array in weights.items()}
        self._pending: PendingUpdate | None = None
        self._staged: dict[str, NDArray[np.float32]] = {}

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._pending, self._staged = None, {}
        check_version(version=version, current=self.version)
        expected = ArrayWeights(self.weights).metadata()
        self._pending = PendingUpdate(expected=expected, announced=metadata, version=version)

    def load(self, chunk: WeightChunk) -> None:
        pending = self._announced()
        pending.check(chunk)
        self._staged.update({weight.meta.name: _as_float32(weight) for weight in chunk})
        pending.record(chunk)

    def commit(self) -> None:
        pending = self._announced()
        pending.check_complete()
        self._hold()
        self.weights, self.version = self._staged, pending.version
        self._pending, self._staged, self.lost = None, {}, False
        self._release()

    def _announced(self) -> PendingUpdate:
        if self._pending is None:
            raise SyncError("no weight update is under way; call begin first")
        return self._pending


class ArrayWeights:
    """A `WeightSource` over float32 numpy arrays, such as a fake trainer's weights."""

    def __init__(self, weights: Weights) -> None:
        """A source that yields `weights` in their order; they must not change while it is in use."""
        self._weights = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in weights.items()}

    def metadata(self) -> list[ParamMeta]:
        """Name and shape of every array."""
        return [ParamMeta(name=name, shape=array.shape, dtype="float32") for name, array in self._weights.items()]

    def iterate(self) -> Iterator[WeightTensor]:
        """The arrays' bytes, with their checksums."""
        for meta in self.metadata():
            data = self._weights[meta.name].reshape(-1).view(np.uint8)
            yield WeightTensor(meta=meta, checksum=checksum(data, item_bytes=4), data=data)


def save_bigram(model: Path, weights: Weights, *, eos_id: int) -> None:
    """Writes the files that `FakeEngine.from_model` reads into the existing directory `model`."""
    vocab_size = len(weights["bias"])
    (model / "config.json").write_text(
        f'{{"model_type": "bigram", "vocab_size": {vocab_size}, "eos_token_id": {eos_id}}}\n', encoding="utf-8"
    )
    np.savez(model / _FILE, allow_pickle=False, **dict(weights))


def _draw(logits_V: NDArray[np.float64], sampling: SamplingConfig, generator: np.random.Generator) -> int:
    if sampling.temperature == 0:
        return int(np.argmax(logits_V))
    p_V = np.exp(_log_softmax(logits_V / sampling.temperature))
    order = np.argsort(-p_V, kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p_V[order]), sampling.top_p) + 1)]
    return int(generator.choice(kept, p=p_V[kept] / p_V[kept].sum()))


def _log_softmax(logits_V: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits_V - logits_V.max()
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return result


def _as_float32(weight: WeightTensor) -> NDArray[np.float32]:
    data = np.array(weight.bytes())  # a copy: the sender's memory is valid only until commit
    if weight.meta.dtype == "bfloat16":  # the upper half of a float32
        values = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = data.view({"float32": np.float32, "float16": np.float16}[weight.meta.dtype]).astype(np.float32)
    return values.reshape(weight.meta.shape)


_conforms: type[RolloutEngine] = FakeEngine
_streams: type[SupportsAsyncGenerate] = FakeEngine
_is_saved: type[SupportsPartial] = FakeEngine
_sleeps: type[SupportsSleep] = FakeEngine
_sink_conforms: type[WeightSink] = _FakeSink
_source_conforms: type[WeightSource] = ArrayWeights
_follows: type[SupportsTokenStream] = FakeEngine
