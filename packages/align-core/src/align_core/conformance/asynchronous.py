"""Checks of an engine that samples in the background, and of one that sleeps."""

import dataclasses
import time
from collections.abc import Collection, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from align_core.config import SamplingConfig
from align_core.conformance.expectations import draw_prompts, expect, refused
from align_core.contracts import (
    RolloutEngine,
    SupportsAsyncGenerate,
    SupportsPartial,
    SupportsSleep,
    SupportsTokenStream,
    WeightSource,
)
from align_core.errors import DataError, SyncError
from align_core.types import Completion, Piece, Prompt

_PATIENCE_S = 120.0


@runtime_checkable
class AsyncEngine(RolloutEngine, SupportsAsyncGenerate, Protocol):
    """What is checked here."""


def check_async(engine: AsyncEngine, *, vocab_size: int, context: int, eos_ids: Collection[int] = ()) -> None:
    """Submitting, polling, aborting and pausing on a live engine with nothing under way, which it is left with."""
    expect(isinstance(engine, AsyncEngine), f"{type(engine).__name__} lacks a method of SupportsAsyncGenerate")
    prompts = draw_prompts(vocab_size, lengths=(3, 7, 5, 7))
    sampling = SamplingConfig(n=3, max_tokens=8, seed=11)
    expect(engine.poll() == [], "poll with nothing under way must return an empty list at once")
    expected = engine.generate(prompts, sampling)
    engine.submit(prompts[:2], sampling)
    engine.submit(prompts[2:], sampling)
    found = _drain(engine, len(expected))
    expect(_by_key(found) == _by_key(expected), "completions that were submitted differ from generate's")
    _check_refusals(engine, prompts, sampling, vocab_size=vocab_size, context=context)
    _check_limits_a_prompt(engine, prompts, sampling, eos_ids)
    _check_abort(engine, prompts, dataclasses.replace(sampling, max_tokens=context - 8))
    _check_pause(engine, prompts, sampling, expected)
    if isinstance(engine, SupportsTokenStream):
        _check_tokens_as_they_come(engine, engine, prompts, sampling, expected)


def _check_tokens_as_they_come(
    engine: AsyncEngine,
    stream: SupportsTokenStream,
    prompts: Sequence[Prompt],
    sampling: SamplingConfig,
    expected: Sequence[Completion],
) -> None:
    """What a listener hears of a completion adds up to it, and says at its last piece that it has ended."""
    heard: list[Piece] = []
    stream.listen(heard.append)
    engine.submit(prompts, sampling)
    found = _drain(engine, len(expected))
    stream.listen(None)
    for completion in found:
        key = (completion.prompt_id, completion.sample)
        pieces = [piece for piece in heard if (piece.prompt_id, piece.sample) == key]
        tokens = [token for piece in pieces for token in piece.tokens]
        expect(tokens == completion.tokens.tolist(), f"the tokens heard of completion {key} are not its tokens")
        reasons = [piece.finish_reason for piece in pieces]
        ends = [*[None] * (len(pieces) - 1), completion.finish_reason]
        expect(reasons == ends, f"completion {key} must be heard to end once, as {completion.finish_reason!r}")
    told = len(heard)
    engine.submit(prompts[:1], sampling)
    _drain(engine, sampling.n)
    expect(len(heard) == told, "a listener that was taken back still hears")


def check_change_on_the_way(
    engine: AsyncEngine,
    *,
    first: WeightSource,
    second: WeightSource,
    vocab_size: int,
    context: int,
    version: int = 1,
    tolerance: float = 1e-4,
) -> None:
    """Weights that change under paused requests: what they had stays, what follows comes from the new ones.

    Args:
        first, second: different weights of the engine's model, which must not end sequences early.
        version: the first of two versions that are sent.
    """
    prompt = Prompt(id=1, tokens=np.asarray([5, 6, 7], np.int32))
    sampling = SamplingConfig(max_tokens=context - 4, temperature=0.0)
    for turn in range(version, version + 20, 2):  # the engine may end before it is paused
        _send(engine, first, turn)
        alone = engine.generate([prompt], sampling)[0]
        engine.submit([prompt, Prompt(id=2, tokens=prompt.tokens, max_tokens=1)], sampling)
        found = engine.poll(_PATIENCE_S)
        engine.pause()
        _send(engine, second, turn + 1)
        engine.resume()
        found += _drain(engine, 2 - len(found))
        mixed = next(c for c in found if c.prompt_id == prompt.id)
        version = turn
        if mixed.versions is not None:
            break
    else:
        expect(False, "no request was under way when the weights changed, ten times")
    versions = mixed.token_versions
    expect(set(versions.tolist()) == {version, version + 1}, f"tokens carry versions {sorted(set(versions.tolist()))}")
    expect(bool(np.all(np.diff(versions) >= 0)), "versions of tokens do not ascend")
    expect(mixed.version == version, "the completion's version is not that of its first token")
    before = int(np.sum(versions == version))
    expect(mixed.tokens[:before].tolist() == alone.tokens[:before].tolist(), "tokens from before the change differ")
    grown = Prompt(id=3, tokens=np.concatenate([prompt.tokens, mixed.tokens[:before]]))
    rest = engine.generate([grown], dataclasses.replace(sampling, max_tokens=len(mixed.tokens) - before))[0]
    expect(mixed.tokens[before:].tolist() == rest.tokens.tolist(), "tokens after the change are not the new weights'")
    close = np.allclose(mixed.logprobs[before:], rest.logprobs, rtol=0, atol=tolerance)
    expect(bool(close), "log-probs after the change are not the new weights'")


def check_partial(engine: AsyncEngine, *, vocab_size: int, context: int, tolerance: float = 1e-4) -> None:
    """What is under way can be asked for, and gone on with: here by the same engine, after it has given all up."""
    if not isinstance(engine, SupportsPartial):
        expect(False, f"{type(engine).__name__} lacks a method of SupportsPartial")
        return
    prompts = draw_prompts(vocab_size, lengths=(4, 6, 5))
    sampling = SamplingConfig(max_tokens=context - 8, temperature=0.0)
    expected = {(c.prompt_id, c.sample): c for c in engine.generate(prompts, sampling)}
    expect(engine.partial() == [], "partial with nothing under way must be empty")
    for _ in range(10):  # everything may have ended before the engine is paused
        engine.submit([*prompts, Prompt(id=999, tokens=prompts[0].tokens, max_tokens=1)], sampling)
        found = engine.poll(_PATIENCE_S)
        engine.pause()
        found += engine.poll(0.0)
        under_way = engine.partial()
        engine.abort()
        engine.resume()
        _drain(engine, len(under_way))
        if any(
            0 < len(c.tokens) < len(expected[c.prompt_id, c.sample].tokens) for c in under_way if c.prompt_id != 999
        ):
            break
    else:
        expect(False, "no request was under way with some of its tokens, ten times")
    begun = [c for c in (*found, *under_way) if c.prompt_id != 999]
    expect({c.finish_reason for c in under_way} == {"abort"}, "what is under way must have finish reason 'abort'")
    expect(_by_key(begun).keys() == expected.keys(), "what is under way and what has ended are not what was submitted")
    for c in begun:
        same = c.tokens.tolist() == expected[c.prompt_id, c.sample].tokens[: len(c.tokens)].tolist()
        expect(same, "the tokens of a request under way are not the first of its completion")
    whole = expected[prompts[0].id, 0]
    others = [c for c in begun if c.prompt_id != whole.prompt_id]
    older = [whole, *(dataclasses.replace(c, version=c.version - 1, versions=None) for c in others)]
    engine.submit_begun(prompts, sampling, older)
    rest = {(c.prompt_id, c.sample): c for c in _drain(engine, sum(c.finish_reason == "abort" for c in older))}
    expect(engine.poll() == [], "a completion that was whole was sampled again")
    for c in older:
        if c.finish_reason == "abort":
            _check_continued(c, rest[c.prompt_id, c.sample], expected[c.prompt_id, c.sample], tolerance)


def _check_continued(begun: Completion, found: Completion, expected: Completion, tolerance: float) -> None:
    count = len(begun.tokens)
    expect(found.tokens.tolist() == expected.tokens.tolist(), "a completion that was gone on with has other tokens")
    expect(found.logprobs[:count].tolist() == begun.logprobs.tolist(), "log-probs from before were not kept")
    close = np.allclose(found.logprobs, expected.logprobs, rtol=0, atol=tolerance)
    expect(bool(close), "log-probs of a completion that was gone on with differ")
    versions = [*begun.token_versions.tolist(), *expected.token_versions[count:].tolist()]
    expect(found.token_versions.tolist() == versions, "tokens do not keep the versions that sampled them")
    expect(found.finish_reason == expected.finish_reason, "a completion that was gone on with ended otherwise")


def check_sleep(engine: RolloutEngine, weights: WeightSource, *, vocab_size: int, version: int = 1) -> None:
    """Asleep it refuses; awake it answers as before; without kept weights it refuses until new ones have come."""
    if not isinstance(engine, SupportsSleep):
        expect(False, f"{type(engine).__name__} lacks a method of SupportsSleep")
        return
    prompts, sampling = draw_prompts(vocab_size, lengths=(3, 5)), SamplingConfig(n=2, max_tokens=6, seed=2)
    _send(engine, weights, version)
    before = _by_key(engine.generate(prompts, sampling))
    engine.wake()
    engine.sleep()
    engine.sleep()
    with refused(SyncError, "asleep", "sampling by an engine that sleeps"):
        engine.generate(prompts, sampling)
    engine.wake()
    expect(_by_key(engine.generate(prompts, sampling)) == before, "an engine that slept answers differently")
    engine.sleep(keep_weights=False)
    engine.wake()
    with refused(SyncError, "without keeping", "sampling with weights that were not kept"):
        engine.generate(prompts, sampling)
    engine.sleep(keep_weights=False)
    _send(engine, weights, version + 1)
    engine.wake()
    expect(_by_key(engine.generate(prompts, sampling)) == before, "weights sent after sleep answer differently")


def _check_refusals(
    engine: AsyncEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, *, vocab_size: int, context: int
) -> None:
    too_long = draw_prompts(vocab_size, lengths=(context - 7,))[0]
    with refused(DataError, str(too_long.id), "a prompt that leaves no room"):
        engine.submit([too_long], sampling)
    engine.pause()
    engine.submit(prompts[:1], sampling)
    with refused(DataError, str(prompts[0].id), "an id that is under way"):
        engine.submit(prompts[:1], sampling)
    engine.resume()
    expect(len(_drain(engine, sampling.n)) == sampling.n, "a refused prompt left completions behind")


def _check_limits_a_prompt(
    engine: AsyncEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, eos_ids: Collection[int]
) -> None:
    limited = [dataclasses.replace(prompt, max_tokens=i + 1) for i, prompt in enumerate(prompts)]
    for found in (engine.generate(limited, sampling), _submit_and_drain(engine, limited, sampling)):
        for c in found:
            limit = next(p.max_tokens for p in limited if p.id == c.prompt_id) or 0
            ended = bool(len(c.tokens)) and int(c.tokens[-1]) in eos_ids
            expect(len(c.tokens) == limit or ended, f"{len(c.tokens)} tokens for a prompt that allows {limit}")
    plain = engine.generate(prompts[:1], sampling)[0]
    last = int(plain.tokens[min(2, len(plain.tokens) - 1)])
    stopped = engine.generate(prompts[:1], dataclasses.replace(sampling, stop_tokens=(last,)))[0]
    kept = plain.tokens[: plain.tokens.tolist().index(last) + 1]
    expect(stopped.tokens.tolist() == kept.tolist(), f"stop token {last}: {stopped.tokens} of {plain.tokens}")
    expect(stopped.finish_reason == "stop", f"a stop token ended with {stopped.finish_reason!r}")


def _check_abort(engine: AsyncEngine, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
    engine.pause()
    engine.submit(prompts[:2], sampling)
    engine.abort([prompts[0].id, 987654])
    engine.abort()
    engine.resume()
    found = _drain(engine, 2 * sampling.n)
    expect({c.finish_reason for c in found} == {"abort"}, "aborted requests do not end with 'abort'")
    expect(engine.poll() == [], "something is under way after everything was aborted")


def _check_pause(
    engine: AsyncEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, expected: Sequence[Completion]
) -> None:
    engine.pause()
    engine.submit(prompts, sampling)
    expect(engine.poll(0.05) == [], "a paused engine gave completions")
    with refused(SyncError, "paused", "generate on a paused engine"):
        engine.generate(prompts[:1], sampling)
    engine.resume()
    expect(_by_key(_drain(engine, len(expected))) == _by_key(expected), "pausing changed what is sampled")


def _drain(engine: AsyncEngine, count: int) -> list[Completion]:
    """At least `count` completions, and whatever comes with them."""
    found: list[Completion] = []
    deadline = time.monotonic() + _PATIENCE_S
    while len(found) < count:
        expect(time.monotonic() < deadline, f"{len(found)} of {count} completions came in {_PATIENCE_S:.0f} s")
        found += engine.poll(1.0)
    keys = [(c.prompt_id, c.sample) for c in found]
    expect(len(set(keys)) == len(keys), f"a completion came twice: {keys}")
    return found


def _submit_and_drain(engine: AsyncEngine, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
    engine.submit(prompts, sampling)
    return _drain(engine, len(prompts) * sampling.n)


def _by_key(completions: Sequence[Completion]) -> dict[tuple[int, int], list[int]]:
    return {(c.prompt_id, c.sample): c.tokens.tolist() for c in completions}


def _send(engine: RolloutEngine, source: WeightSource, version: int) -> None:
    sink = engine.weight_sink()
    sink.begin(source.metadata(), version)
    for weight in source.iterate():
        sink.load([weight])
    sink.commit()
