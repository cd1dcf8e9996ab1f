"""Checks of both ends of a weight update: the sink of a live engine, and the source of a trainer."""

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.config import SamplingConfig
from align_core.conformance.expectations import draw_prompts, expect, refused
from align_core.contracts import RolloutEngine, WeightSink, WeightSource
from align_core.errors import SyncError
from align_core.types import ITEM_BYTES, Completion, ParamMeta, Prompt, WeightTensor, checksum


def check_weight_sink(
    engine: RolloutEngine,
    *,
    first: WeightSource,
    second: WeightSource,
    vocab_size: int,
    version: int = 1,
    tolerance: float = 1e-4,
) -> None:
    """Versions, liveness of the old weights until commit, and refusal of damaged updates, on a live engine.

    That the answers are the new weights' true ones, long prompts included, takes a reference to compare with: test it
    beside this.

    Args:
        first: weights of the engine's model; the engine holds them at the end.
        second: other weights of the same model, different enough to change what is sampled.
        version: the first version to send; above what the engine holds.
        tolerance: largest difference of log-probs, nats, that counts as the same weights.
    """
    sink = engine.weight_sink()
    prompts = draw_prompts(vocab_size, lengths=(3, 9, 6))
    answers = _Answers(engine, prompts, tolerance)
    _send(sink, first, version)
    of_first = answers.ask(version)
    version += 1
    _check_old_weights_stay(sink, second, version, answers, of_first)
    of_second = answers.ask(version)
    expect(not answers.same(of_first, of_second), "the engine answers alike with two different sets of weights")
    for damage in (_corrupted, _missing, _unannounced, _unknown, _misshapen, _outdated):
        damage(sink, first, version)
        expect(
            answers.same(answers.ask(version), of_second),
            f"after a refused update ({damage.__name__.strip('_')}) the engine no longer answers with the old weights",
        )
    version += 1
    _send_by_file(sink, first, version)
    expect(
        answers.same(answers.ask(version), of_first),
        "the first weights, sent again through a file, do not answer as they did before",
    )


def check_weight_source(source: WeightSource) -> None:
    """Metadata and stream agree, and every checksum is that of the bytes."""
    metadata = list(source.metadata())
    names = [meta.name for meta in metadata]
    expect(len(set(names)) == len(names), "metadata() names a weight twice")
    streamed: list[ParamMeta] = []
    for weight in source.iterate():
        meta, data = weight.meta, weight.bytes()
        streamed.append(meta)
        expect(data.nbytes == meta.nbytes, f"weight {meta.name!r} has {data.nbytes} bytes, its shape {meta.nbytes}")
        found = checksum(data, item_bytes=ITEM_BYTES[meta.dtype])
        expect(found == weight.checksum, f"weight {meta.name!r} comes with checksum {weight.checksum}, is {found}")
    expect(streamed == metadata, "iterate() does not yield what metadata() announces, in its order")


class _Answers:
    """What an engine says to fixed prompts: tokens to tell weights apart, log-probs to tell them apart finely."""

    def __init__(self, engine: RolloutEngine, prompts: Sequence[Prompt], tolerance: float) -> None:
        self._engine, self._prompts, self._tolerance = engine, prompts, tolerance

    def ask(self, version: int) -> list[Completion]:
        """Completions, which must carry `version`."""
        found = self._engine.generate(self._prompts, SamplingConfig(n=2, max_tokens=8, seed=3))
        expect(
            {c.version for c in found} == {version}, f"completions carry version {found[0].version}, expected {version}"
        )
        return found

    def same(self, left: Sequence[Completion], right: Sequence[Completion]) -> bool:
        """True if both could come from the same weights."""
        return all(
            np.array_equal(a.tokens, b.tokens)
            and bool(np.allclose(a.logprobs, b.logprobs, rtol=0, atol=self._tolerance))
            for a, b in zip(left, right, strict=True)
        )


def _send(sink: WeightSink, source: WeightSource, version: int) -> None:
    sink.begin(source.metadata(), version)
    for weight in source.iterate():
        sink.load([weight])
    sink.commit()


def _send_by_file(sink: WeightSink, source: WeightSource, version: int) -> None:
    """All weights in one file, which is gone before the commit."""
    sink.begin(source.metadata(), version)
    with tempfile.TemporaryDirectory() as folder:
        file, offset, chunk = Path(folder) / "weights", 0, []
        with file.open("wb") as stream:
            for weight in source.iterate():
                stream.write(weight.bytes().tobytes())
                chunk.append(dataclasses.replace(weight, data=None, file=file, offset=offset))
                offset += weight.meta.nbytes
        sink.load(chunk)
    sink.commit()


def _check_old_weights_stay(
    sink: WeightSink, source: WeightSource, version: int, answers: _Answers, before: Sequence[Completion]
) -> None:
    sink.begin(source.metadata(), version)
    sink.load(_held(source))
    expect(answers.same(answers.ask(version - 1), before), "new weights answer before they are committed")
    sink.commit()


def _held(source: WeightSource) -> list[WeightTensor]:
    """Copies of all weights, which outlive the source's iterator."""
    return [dataclasses.replace(weight, data=np.array(weight.bytes()), file=None) for weight in source.iterate()]


def _flipped(weight: WeightTensor) -> WeightTensor:
    data: NDArray[np.uint8] = np.array(weight.bytes())
    data[len(data) // 2] ^= 1
    return dataclasses.replace(weight, data=data, file=None)


def _corrupted(sink: WeightSink, source: WeightSource, version: int) -> None:
    sink.begin(source.metadata(), version + 1)
    weights = _held(source)
    name = weights[-1].meta.name
    sink.load(weights[:-1])
    with refused(SyncError, name, f"a flipped bit in {name!r}"):
        sink.load([_flipped(weights[-1])])
    with refused(SyncError, name, "the commit of a refused weight"):
        sink.commit()


def _missing(sink: WeightSink, source: WeightSource, version: int) -> None:
    sink.begin(source.metadata(), version + 1)
    weights = _held(source)
    sink.load(weights[1:])
    with refused(SyncError, weights[0].meta.name, f"an update without {weights[0].meta.name!r}"):
        sink.commit()


def _unannounced(sink: WeightSink, source: WeightSource, version: int) -> None:
    metadata = list(source.metadata())
    with refused(SyncError, metadata[0].name, f"an announcement without {metadata[0].name!r}"):
        sink.begin(metadata[1:], version + 1)


def _unknown(sink: WeightSink, source: WeightSource, version: int) -> None:
    stranger = ParamMeta(name="no.such.weight", shape=(2, 2), dtype="float32")
    with refused(SyncError, stranger.name, "an announcement of a weight that the model does not have"):
        sink.begin([*source.metadata(), stranger], version + 1)


def _misshapen(sink: WeightSink, source: WeightSource, version: int) -> None:
    metadata = list(source.metadata())
    wrong = dataclasses.replace(metadata[-1], shape=(*metadata[-1].shape, 3))
    with refused(SyncError, wrong.name, f"{wrong.name!r} of shape {wrong.shape}"):
        sink.begin([*metadata[:-1], wrong], version + 1)


def _outdated(sink: WeightSink, source: WeightSource, version: int) -> None:
    with refused(SyncError, str(version - 1), f"version {version - 1} after version {version}"):
        sink.begin(source.metadata(), version - 1)
