"""What every implementation of a contract must do, as plain functions that raise ConformanceError.

Each implementation calls these in its own tests, the fakes too: a stage that works with one then works with all. Knows
numpy and the contracts, no test framework, and nothing of how an implementation is made.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.config import LossConfig, SamplingConfig
from align_core.contracts import RewardFunction, RolloutEngine, SupportsClose, Trainer, WeightSink, WeightSource
from align_core.errors import AlignError, DataError, SyncError
from align_core.types import ITEM_BYTES, Batch, Completion, ParamMeta, Prompt, Score, WeightTensor, checksum


class ConformanceError(AssertionError):
    """An implementation breaks its contract; says what was expected and what came."""


def check_engine(
    make_engine: Callable[[], RolloutEngine], *, vocab_size: int, context: int, eos_ids: Collection[int] = ()
) -> None:
    """All checks of an engine that need no new weights; makes one engine and closes it, twice.

    Args:
        vocab_size: prompts are drawn from ids below it.
        context: longest prompt plus completion that the engine was made for, at least 32 tokens.
        eos_ids: ids that end a completion.
    """
    engine = make_engine()
    try:
        check_generation(engine, vocab_size=vocab_size, context=context, eos_ids=eos_ids)
    finally:
        engine.close()
        engine.close()


def check_generation(engine: RolloutEngine, *, vocab_size: int, context: int, eos_ids: Collection[int] = ()) -> None:
    """Order, grouping, seeds, lengths, log-probs and limits of a live engine, which stays open."""
    _expect(isinstance(engine, RolloutEngine), f"{type(engine).__name__} lacks a method of RolloutEngine")
    prompts = _prompts(vocab_size, lengths=(3, 7, 5, 7))
    sampling = SamplingConfig(n=3, max_tokens=8, temperature=1.0, seed=11)
    completions = engine.generate(prompts, sampling)
    _check_shape(completions, prompts, sampling, eos_ids)
    _expect(engine.generate([], sampling) == [], "no prompts must give no completions")
    _check_seeds(engine, prompts, sampling, completions)
    _check_greedy(engine, prompts, eos_ids)
    _check_limits(engine, vocab_size=vocab_size, context=context)


def check_weight_sink(
    engine: RolloutEngine,
    *,
    first: WeightSource,
    second: WeightSource,
    vocab_size: int,
    context: int,
    tolerance: float = 1e-4,
) -> None:
    """Versions, liveness of the old weights until commit, and refusal of damaged updates, on a live engine.

    Args:
        first: weights of the engine's model; the engine holds them at the end.
        second: other weights of the same model, different enough to change what is sampled.
        tolerance: largest difference of log-probs, nats, that counts as the same weights.
    """
    sink = engine.weight_sink()
    # One prompt fills the context, so that cached keys and values of older weights would show.
    prompts = _prompts(vocab_size, lengths=(3, context - 8, 6))
    answers = _Answers(engine, prompts, tolerance)
    version = 1
    _send(sink, first, version)
    of_first = answers.ask(version)
    version += 1
    _check_old_weights_stay(sink, second, version, answers, of_first)
    of_second = answers.ask(version)
    _expect(not answers.same(of_first, of_second), "the engine answers alike with two different sets of weights")
    for damage in (_corrupted, _missing, _unannounced, _unknown, _misshapen, _outdated):
        damage(sink, first, version)
        _expect(
            answers.same(answers.ask(version), of_second),
            f"after a refused update ({damage.__name__.strip('_')}) the engine no longer answers with the old weights",
        )
    version += 1
    _send_by_file(sink, first, version)
    _expect(
        answers.same(answers.ask(version), of_first),
        "the first weights, sent again through a file, do not answer as they did before",
    )


def check_weight_source(source: WeightSource) -> None:
    """Metadata and stream agree, and every checksum is that of the bytes."""
    metadata = list(source.metadata())
    names = [meta.name for meta in metadata]
    _expect(len(set(names)) == len(names), "metadata() names a weight twice")
    streamed: list[ParamMeta] = []
    for weight in source.iterate():
        meta, data = weight.meta, weight.bytes()
        streamed.append(meta)
        _expect(data.nbytes == meta.nbytes, f"weight {meta.name!r} has {data.nbytes} bytes, its shape {meta.nbytes}")
        found = checksum(data, item_bytes=ITEM_BYTES[meta.dtype])
        _expect(found == weight.checksum, f"weight {meta.name!r} comes with checksum {weight.checksum}, is {found}")
    _expect(streamed == metadata, "iterate() does not yield what metadata() announces, in its order")


def check_trainer(
    make_trainer: Callable[[], Trainer], *, batch: Batch, loss: LossConfig, folder: Path, tolerance: float = 1e-5
) -> None:
    """Log-probs, updates, weights, and saving and loading of a trainer.

    Args:
        make_trainer: gives equal trainers each time it is called.
        batch: sequences with the columns that `loss` needs.
        folder: an empty directory to save in.
        tolerance: largest difference of log-probs, nats, between trainers in the same state.
    """
    trainer = make_trainer()
    try:
        before = _check_logprobs(trainer, batch)
        check_weight_source(trainer.weights())
        _check_step(trainer, batch, loss)
        after = _check_logprobs(trainer, batch)
        _expect(_distance(before, after) > 0, "step() changed no log-prob")
        state = {"step": "1", "note": "a\nb"}
        trainer.save(folder / "saved", state)
        _check_step(trainer, batch, loss)
        further = _check_logprobs(trainer, batch)
    finally:
        _close(trainer)
    restored = make_trainer()
    try:
        _expect(dict(restored.load(folder / "saved")) == state, "load() does not return the state that was saved")
        _same(_check_logprobs(restored, batch), after, tolerance, "a loaded trainer scores unlike the saved one")
        _check_step(restored, batch, loss)
        _same(_check_logprobs(restored, batch), further, tolerance, "after load() the next step differs")
    finally:
        _close(restored)


def check_reward(
    reward: RewardFunction,
    *,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[object]],
) -> None:
    """One finite score or reason a completion, the same whatever else is in the call."""
    scores = list(reward(prompts, completions, columns))
    _expect(len(scores) == len(completions), f"{len(completions)} completions got {len(scores)} scores")
    for score in scores:
        _expect(isinstance(score, Score), f"a score is a {type(score).__name__}, not an align_core.types.Score")
        _expect(score.value is None or math.isfinite(score.value), f"a score is {score.value}")
    _expect(list(reward(prompts, completions, columns)) == scores, "the same call twice gives different scores")
    for i, score in enumerate(scores):
        one = {name: [values[i]] for name, values in columns.items()}
        _expect(
            list(reward([prompts[i]], [completions[i]], one)) == [score],
            f"completion {i} is scored differently when it comes alone",
        )
    none: Mapping[str, Sequence[object]] = {name: [] for name in columns}
    _expect(list(reward([], [], none)) == [], "no completions must give no scores")


def _expect(condition: bool, text: str) -> None:
    if not condition:
        raise ConformanceError(text)


@contextmanager
def _refused(error: type[AlignError], name: str, what: str) -> Iterator[None]:
    """Expects `error` with `name` in its text."""
    try:
        yield
    except error as refusal:
        _expect(name in str(refusal), f"the refusal of {what} does not name {name!r}: {refusal}")
        return
    raise ConformanceError(f"{what} was accepted; {error.__name__} was expected")


def _prompts(vocab_size: int, *, lengths: Sequence[int]) -> list[Prompt]:
    """Prompts of these lengths with descending ids; equal lengths give equal tokens, so that only ids tell them apart."""
    top = 10 * len(lengths)
    drawn = {length: np.random.default_rng(length).integers(0, vocab_size, size=length) for length in lengths}
    return [Prompt(id=top - i, tokens=drawn[length].astype(np.int32)) for i, length in enumerate(lengths)]


def _check_shape(
    completions: Sequence[Completion], prompts: Sequence[Prompt], sampling: SamplingConfig, eos_ids: Collection[int]
) -> None:
    order = [(prompt.id, sample) for prompt in prompts for sample in range(sampling.n)]
    found = [(c.prompt_id, c.sample) for c in completions]
    _expect(found == order, f"completions must come as (prompt id, sample) {order}, came as {found}")
    _expect(len({c.version for c in completions}) == 1, "completions of one call carry different weight versions")
    for c in completions:
        label = f"completion {c.sample} of prompt {c.prompt_id}"
        length = len(c.tokens)
        _expect(c.tokens.dtype == np.int32, f"{label} has {c.tokens.dtype} tokens, not int32")
        _expect(c.logprobs.dtype == np.float32, f"{label} has {c.logprobs.dtype} log-probs, not float32")
        _expect(
            c.tokens.ndim == 1 and c.logprobs.shape == (length,),
            f"{label}: {length} tokens, another number of log-probs",
        )
        _expect(
            1 <= length <= sampling.max_tokens, f"{label} has {length} tokens; 1 .. {sampling.max_tokens} are allowed"
        )
        _expect(
            bool(np.all(np.isfinite(c.logprobs) & (c.logprobs <= 0))), f"{label} has log-probs above 0 or not finite"
        )
        _check_finish(c, label, sampling, eos_ids)


def _check_finish(c: Completion, label: str, sampling: SamplingConfig, eos_ids: Collection[int]) -> None:
    ends = [token in eos_ids for token in c.tokens.tolist()]
    _expect(not any(ends[:-1]), f"{label} goes on after an end-of-sequence token")
    expected = "stop" if ends[-1] else "length"
    _expect(c.finish_reason == expected, f"{label} ended with {c.finish_reason!r}; its tokens say {expected!r}")
    if expected == "length":
        full = len(c.tokens) == sampling.max_tokens
        _expect(full, f"{label} ended by 'length' after {len(c.tokens)} of {sampling.max_tokens} tokens")


def _check_seeds(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, completions: Sequence[Completion]
) -> None:
    by_prompt = {p.id: [c.tokens.tolist() for c in completions if c.prompt_id == p.id] for p in prompts}
    for prompt in reversed(prompts):
        alone = [c.tokens.tolist() for c in engine.generate([prompt], sampling)]
        _expect(alone == by_prompt[prompt.id], f"prompt {prompt.id} is sampled differently when it comes alone")
    fewer = engine.generate(prompts, dataclasses.replace(sampling, n=1))
    _expect(
        [c.tokens.tolist() for c in fewer] == [samples[0] for samples in by_prompt.values()],
        "sample 0 depends on how many samples are asked for",
    )
    other = engine.generate(prompts, dataclasses.replace(sampling, seed=sampling.seed + 1))
    _expect(
        [c.tokens.tolist() for c in other] != [c.tokens.tolist() for c in completions],
        "another seed gives the same completions",
    )
    twins = [prompt.id for prompt in prompts if np.array_equal(prompt.tokens, prompts[-1].tokens)]
    _expect(by_prompt[twins[0]] != by_prompt[twins[1]], "two prompts with equal tokens and different ids share samples")
    _expect(
        any(len(set(map(tuple, samples))) > 1 for samples in by_prompt.values()), "all samples of a prompt are equal"
    )


def _check_greedy(engine: RolloutEngine, prompts: Sequence[Prompt], eos_ids: Collection[int]) -> None:
    greedy = SamplingConfig(n=1, max_tokens=8, temperature=0.0, seed=1)
    found = engine.generate(prompts, greedy)
    _check_shape(found, prompts, greedy, eos_ids)
    again = engine.generate(prompts, dataclasses.replace(greedy, seed=2))
    _expect(
        [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in again], "greedy decoding depends on the seed"
    )
    _expect(found[1].tokens.tolist() == found[3].tokens.tolist(), "greedy decoding of equal prompts differs")


def _check_limits(engine: RolloutEngine, *, vocab_size: int, context: int) -> None:
    sampling = SamplingConfig(n=1, max_tokens=8)
    engine.generate(_prompts(vocab_size, lengths=(context - 8,)), sampling)
    fits, too_long = _prompts(vocab_size, lengths=(3, context - 7))
    with _refused(DataError, str(too_long.id), f"a prompt of {context - 7} tokens with 8 to come in {context}"):
        engine.generate([fits, too_long], sampling)
    with _refused(DataError, str(fits.id), "a prompt id that occurs twice in one call"):
        engine.generate([fits, fits], sampling)
    with _refused(DataError, "77", "an empty prompt"):
        engine.generate([Prompt(id=77, tokens=np.zeros(0, np.int32))], sampling)


class _Answers:
    """What an engine says to fixed prompts: tokens to tell weights apart, log-probs to tell them apart finely."""

    def __init__(self, engine: RolloutEngine, prompts: Sequence[Prompt], tolerance: float) -> None:
        self._engine, self._prompts, self._tolerance = engine, prompts, tolerance

    def ask(self, version: int) -> list[Completion]:
        """Completions, which must carry `version`."""
        found = self._engine.generate(self._prompts, SamplingConfig(n=2, max_tokens=8, seed=3))
        _expect(
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
    sink.load(list(source.iterate()))
    _expect(answers.same(answers.ask(version - 1), before), "new weights answer before they are committed")
    sink.commit()


def _flipped(weight: WeightTensor) -> WeightTensor:
    data: NDArray[np.uint8] = np.array(weight.bytes())
    data[len(data) // 2] ^= 1
    return dataclasses.replace(weight, data=data, file=None)


def _corrupted(sink: WeightSink, source: WeightSource, version: int) -> None:
    sink.begin(source.metadata(), version + 1)
    weights = list(source.iterate())
    name = weights[-1].meta.name
    with _refused(SyncError, name, f"a flipped bit in {name!r}"):
        sink.load([*weights[:-1], _flipped(weights[-1])])
    with _refused(SyncError, name, "the commit of a refused weight"):
        sink.commit()


def _missing(sink: WeightSink, source: WeightSource, version: int) -> None:
    sink.begin(source.metadata(), version + 1)
    weights = list(source.iterate())
    sink.load(weights[1:])
    with _refused(SyncError, weights[0].meta.name, f"an update without {weights[0].meta.name!r}"):
        sink.commit()


def _unannounced(sink: WeightSink, source: WeightSource, version: int) -> None:
    metadata = list(source.metadata())
    with _refused(SyncError, metadata[0].name, f"an announcement without {metadata[0].name!r}"):
        sink.begin(metadata[1:], version + 1)


def _unknown(sink: WeightSink, source: WeightSource, version: int) -> None:
    stranger = ParamMeta(name="no.such.weight", shape=(2, 2), dtype="float32")
    with _refused(SyncError, stranger.name, "an announcement of a weight that the model does not have"):
        sink.begin([*source.metadata(), stranger], version + 1)


def _misshapen(sink: WeightSink, source: WeightSource, version: int) -> None:
    metadata = list(source.metadata())
    wrong = dataclasses.replace(metadata[-1], shape=(*metadata[-1].shape, 3))
    with _refused(SyncError, wrong.name, f"{wrong.name!r} of shape {wrong.shape}"):
        sink.begin([*metadata[:-1], wrong], version + 1)


def _outdated(sink: WeightSink, source: WeightSource, version: int) -> None:
    with _refused(SyncError, str(version - 1), f"version {version - 1} after version {version}"):
        sink.begin(source.metadata(), version - 1)


def _check_logprobs(trainer: Trainer, batch: Batch) -> NDArray[np.float32]:
    found = trainer.logprobs(batch)
    _expect(found.shape == batch.tokens.shape, f"logprobs() has shape {found.shape} for {len(batch.tokens)} tokens")
    _expect(found.dtype == np.float32, f"logprobs() is {found.dtype}, not float32")
    _expect(bool(np.all(np.isfinite(found) & (found <= 0))), "logprobs() has values above 0 or not finite")
    _expect(bool(np.all(found[batch.offsets[:-1]] == 0)), "the first token of a sequence must have log-prob 0")
    backwards = trainer.logprobs(batch.select(np.arange(len(batch))[::-1].astype(np.int64)))
    parts = [backwards[end - length : end] for end, length in zip(np.cumsum(batch.lengths[::-1]), batch.lengths[::-1])]
    _same(np.concatenate(parts[::-1]), found, 1e-4, "log-probs depend on the order of the sequences")
    return found


def _check_step(trainer: Trainer, batch: Batch, loss: LossConfig) -> None:
    metrics = trainer.step(batch, loss)
    for name in ("loss", "grad_norm", "lr"):
        _expect(name in metrics, f"step() reports {sorted(metrics)}, but no {name!r}")
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    _expect(not bad, f"step() reports values that are not finite: {bad}")


def _distance(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    return float(np.max(np.abs(left - right), initial=0.0))


def _same(left: NDArray[np.float32], right: NDArray[np.float32], tolerance: float, text: str) -> None:
    distance = _distance(left, right)
    _expect(distance <= tolerance, f"{text}: largest difference {distance:.3g} nats, allowed {tolerance:g}")


def _close(trainer: Trainer) -> None:
    if isinstance(trainer, SupportsClose):
        trainer.close()
        trainer.close()
