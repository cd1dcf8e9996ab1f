"""Checks of a rollout engine that need no new weights: order, seeds, lengths, log-probs, limits."""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from align_core.config import SamplingConfig
from align_core.conformance.expectations import draw_prompts, expect, refused
from align_core.contracts import RolloutEngine
from align_core.errors import DataError
from align_core.types import Completion, Prompt


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
    expect(isinstance(engine, RolloutEngine), f"{type(engine).__name__} lacks a method of RolloutEngine")
    prompts = draw_prompts(vocab_size, lengths=(3, 7, 5, 7))
    sampling = SamplingConfig(n=3, max_tokens=8, temperature=1.0, seed=11)
    completions = engine.generate(prompts, sampling)
    _check_shape(completions, prompts, sampling, eos_ids)
    expect(engine.generate([], sampling) == [], "no prompts must give no completions")
    _check_seeds(engine, prompts, sampling, completions)
    _check_greedy(engine, prompts, eos_ids)
    _check_limits(engine, vocab_size=vocab_size, context=context)


def _check_shape(
    completions: Sequence[Completion], prompts: Sequence[Prompt], sampling: SamplingConfig, eos_ids: Collection[int]
) -> None:
    order = [(prompt.id, sample) for prompt in prompts for sample in range(sampling.n)]
    found = [(c.prompt_id, c.sample) for c in completions]
    expect(found == order, f"completions must come as (prompt id, sample) {order}, came as {found}")
    expect(len({c.version for c in completions}) == 1, "completions of one call carry different weight versions")
    for c in completions:
        label = f"completion {c.sample} of prompt {c.prompt_id}"
        length = len(c.tokens)
        expect(c.tokens.dtype == np.int32, f"{label} has {c.tokens.dtype} tokens, not int32")
        expect(c.logprobs.dtype == np.float32, f"{label} has {c.logprobs.dtype} log-probs, not float32")
        expect(
            c.logprobs.shape == c.tokens.shape == (length,), f"{label}: {len(c.logprobs)} log-probs, {length} tokens"
        )
        expect(1 <= length <= sampling.max_tokens, f"{label} has {length} tokens, allowed 1 .. {sampling.max_tokens}")
        sound = np.isfinite(c.logprobs) & (c.logprobs <= 0)
        expect(bool(np.all(sound)), f"{label} has log-probs above 0 or not finite: {c.logprobs[~sound].tolist()[:4]}")
        _check_finish(c, label, sampling, eos_ids)


def _check_finish(c: Completion, label: str, sampling: SamplingConfig, eos_ids: Collection[int]) -> None:
    ends = [token in eos_ids for token in c.tokens.tolist()]
    expect(not any(ends[:-1]), f"{label} goes on after an end-of-sequence token")
    expected = "stop" if ends[-1] else "length"
    expect(c.finish_reason == expected, f"{label} ended with {c.finish_reason!r}; its tokens say {expected!r}")
    if expected == "length":
        full = len(c.tokens) == sampling.max_tokens
        expect(full, f"{label} ended by 'length' after {len(c.tokens)} of {sampling.max_tokens} tokens")


def _check_seeds(
    engine: RolloutEngine, prompts: Sequence[Prompt], sampling: SamplingConfig, completions: Sequence[Completion]
) -> None:
    by_prompt = {p.id: [c.tokens.tolist() for c in completions if c.prompt_id == p.id] for p in prompts}
    for prompt in reversed(prompts):
        alone = [c.tokens.tolist() for c in engine.generate([prompt], sampling)]
        expect(alone == by_prompt[prompt.id], f"prompt {prompt.id} is sampled differently when it comes alone")
    fewer = engine.generate(prompts, dataclasses.replace(sampling, n=1))
    expect(
        [c.tokens.tolist() for c in fewer] == [samples[0] for samples in by_prompt.values()],
        "sample 0 depends on how many samples are asked for",
    )
    other = engine.generate(prompts, dataclasses.replace(sampling, seed=sampling.seed + 1))
    expect(
        [c.tokens.tolist() for c in other] != [c.tokens.tolist() for c in completions],
        "another seed gives the same completions",
    )
    twins = [prompt.id for prompt in prompts if np.array_equal(prompt.tokens, prompts[-1].tokens)]
    expect(by_prompt[twins[0]] != by_prompt[twins[1]], "two prompts with equal tokens and different ids share samples")
    varied = any(len(set(map(tuple, samples))) > 1 for samples in by_prompt.values())
    expect(varied, "all samples of a prompt are equal")


def _check_greedy(engine: RolloutEngine, prompts: Sequence[Prompt], eos_ids: Collection[int]) -> None:
    greedy = SamplingConfig(n=1, max_tokens=8, temperature=0.0, seed=1)
    found = engine.generate(prompts, greedy)
    _check_shape(found, prompts, greedy, eos_ids)
    again = engine.generate(prompts, dataclasses.replace(greedy, seed=2))
    expect(
        [c.tokens.tolist() for c in found] == [c.tokens.tolist() for c in again], "greedy decoding depends on the seed"
    )
    expect(found[1].tokens.tolist() == found[3].tokens.tolist(), "greedy decoding of equal prompts differs")


def _check_limits(engine: RolloutEngine, *, vocab_size: int, context: int) -> None:
    sampling = SamplingConfig(n=1, max_tokens=8)
    engine.generate(draw_prompts(vocab_size, lengths=(context - 8,)), sampling)
    fits, too_long = draw_prompts(vocab_size, lengths=(3, context - 7))
    with refused(DataError, str(too_long.id), f"a prompt of {context - 7} tokens with 8 to come in {context}"):
        engine.generate([fits, too_long], sampling)
    with refused(DataError, str(fits.id), "a prompt id that occurs twice in one call"):
        engine.generate([fits, fits], sampling)
    with refused(DataError, "77", "an empty prompt"):
        engine.generate([Prompt(id=77, tokens=np.zeros(0, np.int32))], sampling)
