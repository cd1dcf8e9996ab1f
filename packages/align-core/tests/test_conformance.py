"""Each check of the kit fails on an implementation with the fault that it is there for, and passes on a sound one.

The sound engine is align-rollout's fake; the sound trainer is a numpy bigram model below.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from align_core.config import LossConfig, SamplingConfig, SftLoss
from align_core.conformance import (
    ConformanceError,
    check_engine,
    check_generation,
    check_reward,
    check_trainer,
    check_weight_sink,
    check_weight_source,
)
from align_core.contracts import WeightSource
from align_core.errors import SyncError
from align_core.types import Batch, Completion, ParamMeta, Prompt, Score, WeightChunk, WeightTensor
from align_rollout.fake import ArrayWeights, FakeEngine

_VOCAB = 16
_CONTEXT = 64


def _weights(seed: int) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(seed)
    return {
        "bigram.weight": generator.normal(size=(_VOCAB, _VOCAB)).astype(np.float32),
        "bias": generator.normal(size=_VOCAB).astype(np.float32),
    }


class _Engine(FakeEngine):
    """The sound engine; subclasses break one thing each."""

    def __init__(self) -> None:
        super().__init__(weights=_weights(0), eos_ids=[2], context=_CONTEXT)
        self.closed = 0

    def close(self) -> None:
        self.closed += 1


class _Unordered(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return super().generate(prompts, sampling)[::-1]


class _BatchDependent(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return super().generate(prompts, dataclasses.replace(sampling, seed=sampling.seed + len(prompts)))


class _Seedless(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return super().generate(prompts, dataclasses.replace(sampling, seed=0))


class _GroupsByTokens(_Engine):
    """Takes the seed from the tokens: two prompts with equal tokens share their samples."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        renamed = [Prompt(id=int(prompt.tokens.sum()), tokens=prompt.tokens) for prompt in prompts]
        found = [c for prompt in renamed for c in super(_GroupsByTokens, self).generate([prompt], sampling)]
        ids = [prompt.id for prompt in prompts for _ in range(sampling.n)]
        return [dataclasses.replace(c, prompt_id=i) for i, c in zip(ids, found, strict=True)]


class _PositiveLogprobs(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return [dataclasses.replace(c, logprobs=-c.logprobs) for c in super().generate(prompts, sampling)]


class _InventsEos(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        return [
            dataclasses.replace(c, tokens=np.append(c.tokens[:-1], np.int32(2)))
            for c in super().generate(prompts, sampling)
        ]


class _CutsPrompts(_Engine):
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        room = _CONTEXT - sampling.max_tokens
        return super().generate([Prompt(id=p.id, tokens=p.tokens[-room:]) for p in prompts], sampling)


@pytest.mark.parametrize(
    ("engine", "complaint"),
    [
        (_Unordered, "must come as"),
        (_BatchDependent, "differently when it comes alone"),
        (_Seedless, "another seed gives the same"),
        (_GroupsByTokens, "equal tokens and different ids share samples"),
        (_PositiveLogprobs, "log-probs above 0"),
        (_InventsEos, "ended with 'length'"),
        (_CutsPrompts, "was accepted; DataError was expected"),
    ],
)
def test_check_generation_finds_the_fault(engine: type[_Engine], complaint: str) -> None:
    with pytest.raises(ConformanceError, match=complaint):
        check_generation(engine(), vocab_size=_VOCAB, context=_CONTEXT, eos_ids=[2])


def test_check_engine_passes_and_closes_twice() -> None:
    engine = _Engine()
    check_engine(lambda: engine, vocab_size=_VOCAB, context=_CONTEXT, eos_ids=[2])
    assert engine.closed == 2


class _Sink:
    """Passes everything on to the sound sink; subclasses break one thing each."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.inner = engine, engine._sink

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self.inner.begin(metadata, version)

    def load(self, chunk: WeightChunk) -> None:
        self.inner.load(chunk)

    def commit(self) -> None:
        self.inner.commit()


class _Trusting(_Sink):
    """Believes every checksum."""

    def load(self, chunk: WeightChunk) -> None:
        honest = ArrayWeights({w.meta.name: w.bytes().view(np.float32).reshape(w.meta.shape) for w in chunk})
        self.inner.load(list(honest.iterate()))


class _Eager(_Sink):
    """Lets new weights answer before the commit."""

    def load(self, chunk: WeightChunk) -> None:
        self.inner.load(chunk)
        self.inner.weights = {**self.inner.weights, **self.inner._staged}


class _Deaf(_Sink):
    """Counts versions and keeps the old weights."""

    def commit(self) -> None:
        old = self.inner.weights
        self.inner.commit()
        self.inner.weights = old


class _Forgiving(_Sink):
    """Commits what has come, whatever is missing."""

    def commit(self) -> None:
        staged = {**self.inner.weights, **self.inner._staged}
        try:
            self.inner.commit()
        except SyncError:
            self.inner.weights = staged


class _Versionless(_Sink):
    def commit(self) -> None:
        self.inner.commit()
        self.inner.version = 0


class _Unchecked(_Sink):
    """Takes any announcement: keeps what it knows of it."""

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self.inner.begin(ArrayWeights(self.inner.weights).metadata(), version)


@pytest.mark.parametrize(
    ("sink", "complaint"),
    [
        (_Trusting, "a flipped bit in 'bias' was accepted"),
        (_Eager, "before they are committed"),
        (_Deaf, "alike with two different sets"),
        (_Forgiving, "was accepted; SyncError was expected"),
        (_Versionless, "carry version 0, expected 1"),
        (_Unchecked, "an announcement without 'bigram.weight' was accepted"),
    ],
)
def test_check_weight_sink_finds_the_fault(sink: type[_Sink], complaint: str) -> None:
    engine = _Engine()
    broken = sink(engine)
    engine.weight_sink = lambda: broken  # type: ignore[method-assign]
    with pytest.raises(ConformanceError, match=complaint):
        check_weight_sink(
            engine,
            first=ArrayWeights(_weights(1)),
            second=ArrayWeights(_weights(2)),
            vocab_size=_VOCAB,
        )


class _WrongChecksum(ArrayWeights):
    def iterate(self) -> Iterator[WeightTensor]:
        return (dataclasses.replace(weight, checksum=weight.checksum ^ 1) for weight in super().iterate())


class _WrongOrder(ArrayWeights):
    def iterate(self) -> Iterator[WeightTensor]:
        return reversed(list(super().iterate()))


@pytest.mark.parametrize(
    ("source", "complaint"), [(_WrongChecksum, "comes with checksum"), (_WrongOrder, "in its order")]
)
def test_check_weight_source_finds_the_fault(source: type[ArrayWeights], complaint: str) -> None:
    with pytest.raises(ConformanceError, match=complaint):
        check_weight_source(source(_weights(0)))


class _Bigram:
    """A sound trainer: logits = table[previous token], plain gradient descent on the mean cross-entropy."""

    def __init__(self) -> None:
        self.table = np.random.default_rng(0).normal(size=(_VOCAB, _VOCAB)).astype(np.float32)

    def _log_p(self) -> NDArray[np.float32]:
        shifted = self.table - self.table.max(axis=1, keepdims=True)
        result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        previous = np.roll(batch.tokens, 1)
        found = self._log_p()[previous, batch.tokens]
        found[batch.offsets[:-1]] = 0
        return found

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        previous, mask = np.roll(batch.tokens, 1), batch.mask
        gradient = np.zeros_like(self.table)
        np.add.at(gradient, previous[mask], np.exp(self._log_p())[previous[mask]])
        np.add.at(gradient, (previous[mask], batch.tokens[mask]), -1.0)
        value = -float(self.logprobs(batch)[mask].mean())
        self.table = self.table - np.float32(0.5 / mask.sum()) * gradient
        return {"loss": value, "grad_norm": float(np.linalg.norm(gradient)), "lr": 0.5}

    def weights(self) -> WeightSource:
        return ArrayWeights({"table": self.table})

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        path.mkdir()
        np.save(path / "table.npy", self.table)
        (path / "state.json").write_text(json.dumps(dict(state)))

    def load(self, path: Path) -> Mapping[str, str]:
        self.table = np.load(path / "table.npy")
        state: dict[str, str] = json.loads((path / "state.json").read_text())
        return state


class _ForgetsToLoad(_Bigram):
    def load(self, path: Path) -> Mapping[str, str]:
        return dict(json.loads((path / "state.json").read_text()))


class _LosesState(_Bigram):
    def load(self, path: Path) -> Mapping[str, str]:
        super().load(path)
        return {}


class _Idle(_Bigram):
    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        return {"loss": 1.0, "grad_norm": 0.0, "lr": 0.5}


class _Leaky(_Bigram):
    """Scores a sequence's second token by the batch's first one: attention over a sequence's border."""

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        found = super().logprobs(batch)
        inner = np.setdiff1d(batch.offsets[:-1] + 1, batch.offsets)
        found[inner] = self._log_p()[batch.tokens[0], batch.tokens[inner]]
        return found


def _batch() -> Batch:
    sequences = [[3, 4, 5], [7, 8], [9, 3, 4, 2]]
    mask = [np.arange(len(sequence)) > 0 for sequence in sequences]
    return Batch.of(sequences, tokens={"mask": mask})


def test_check_trainer_passes(tmp_path: Path) -> None:
    check_trainer(_Bigram, batch=_batch(), loss=SftLoss(), folder=tmp_path)


@pytest.mark.parametrize(
    ("trainer", "complaint"),
    [
        (_ForgetsToLoad, "a loaded trainer scores unlike the saved one"),
        (_LosesState, "does not return the state"),
        (_Idle, "changed no log-prob"),
        (_Leaky, "depend on the order of the sequences"),
    ],
)
def test_check_trainer_finds_the_fault(trainer: type[_Bigram], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(ConformanceError, match=complaint):
        check_trainer(trainer, batch=_batch(), loss=SftLoss(), folder=tmp_path)


_Columns = Mapping[str, Sequence[object]]


def _length(prompts: Sequence[str], completions: Sequence[str], columns: _Columns) -> list[Score]:
    wanted = columns["length"]
    return [Score(value=float(len(text) == length)) for text, length in zip(completions, wanted, strict=True)]


def _relative(
    prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
) -> list[Score]:
    longest = max(map(len, completions), default=1)
    return [Score(value=len(text) / longest) for text in completions]


def _short(prompts: Sequence[str], completions: Sequence[str], columns: _Columns) -> list[Score]:
    return _length(prompts, completions, columns)[1:]


def test_check_reward_passes() -> None:
    check_reward(_length, prompts=["p", "q"], completions=["ab", "abc"], columns={"length": [2, 2]})


def test_check_reward_finds_a_missing_score() -> None:
    with pytest.raises(ConformanceError, match="2 completions got 1 scores"):
        check_reward(_short, prompts=["p", "q"], completions=["ab", "abc"], columns={"length": [2, 2]})


def test_check_reward_finds_dependence_on_the_batch() -> None:
    with pytest.raises(ConformanceError, match="completion 0 is scored differently when it comes alone"):
        check_reward(_relative, prompts=["p", "q"], completions=["ab", "abc"], columns={"length": [2, 2]})
