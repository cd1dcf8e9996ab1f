"""Tokens a second of any engine on random prompts; of vLLM, beside its own `LLM.generate` in the same process."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from align_core.config import SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import ConfigError
from align_core.types import Prompt
from align_rollout.vllm import VllmEngine

_WARM = 10  # a share of so much of the prompts warms the engine up


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is asked of an engine."""

    prompts: int
    prompt_tokens: int
    """Of each."""
    vocab_size: int
    """Token ids are drawn from 0 .. vocab_size - 1."""
    seed: int = 0

    def draws(self) -> Iterator[list[Prompt]]:
        """Prompts not seen before, each time: the first a tenth as many as the others."""
        generator = np.random.default_rng(self.seed)
        count = max(1, self.prompts // _WARM)
        while True:
            tokens = generator.integers(0, self.vocab_size, (count, self.prompt_tokens)).astype(np.int32)
            yield [Prompt(id=i, tokens=row) for i, row in enumerate(tokens)]
            count = self.prompts


def measure(engine: RolloutEngine, load: Load, sampling: SamplingConfig) -> dict[str, Any]:
    """Generates once to warm up and once measured."""
    draws = load.draws()
    _run(lambda asked: _ours(engine, asked, sampling), next(draws))
    new, seconds = _run(lambda asked: _ours(engine, asked, sampling), next(draws))
    return {
        "prompts": load.prompts,
        "prompt_tokens": load.prompts * load.prompt_tokens,
        "new_tokens": new,
        "seconds": seconds,
        "new_tokens_per_second": new / seconds,
    }


def measure_beside_plain(engine: RolloutEngine, load: Load, sampling: SamplingConfig, *, pairs: int) -> dict[str, Any]:
    """The engine's tokens a second and those of `vllm.LLM.generate`, of the very same LLM, in turn.

    Each of `pairs` pairs runs both on prompts that neither has seen, the second pair in the other order, and so on.
    Plain vLLM returns the sampled tokens' log-probs too, and draws without a seed a request.

    Raises:
        ConfigError: the engine is not vLLM.
    """
    if not isinstance(engine, VllmEngine):
        raise ConfigError(
            f"--plain-pairs compares the engine 'vllm' with vLLM itself; this is a {type(engine).__name__}"
        )
    sides: dict[str, Callable[[Sequence[Prompt]], int]] = {
        "ours": lambda asked: _ours(engine, asked, sampling),
        "plain": lambda asked: engine.generate_plainly(asked, sampling),
    }
    draws = load.draws()
    warm = next(draws)
    for side in sides.values():
        side(warm)
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(pairs):
        for name in sorted(sides, reverse=pair % 2 == 1):
            new, seconds = _run(sides[name], next(draws))
            rates[name].append(new / seconds)
    ratios = [ours / plain for ours, plain in zip(rates["ours"], rates["plain"], strict=True)]
    return {
        "prompts": load.prompts,
        "prompt_tokens": load.prompts * load.prompt_tokens,
        "new_tokens_per_second": rates["ours"],
        "plain_new_tokens_per_second": rates["plain"],
        "ratios_to_plain": ratios,
        "median_ratio_to_plain": statistics.median(ratios),
    }


def _run(side: Callable[[Sequence[Prompt]], int], asked: Sequence[Prompt]) -> tuple[int, float]:
    started = time.perf_counter()
    new = side(asked)
    return new, time.perf_counter() - started


def _ours(engine: RolloutEngine, asked: Sequence[Prompt], sampling: SamplingConfig) -> int:
    return sum(len(completion.tokens) for completion in engine.generate(asked, sampling))
