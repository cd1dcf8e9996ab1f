"""Tokens a second of any engine on random prompts."""

import time

import numpy as np

from align_core.config import SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.types import Prompt


def measure(
    engine: RolloutEngine, *, prompts: int, prompt_tokens: int, sampling: SamplingConfig, vocab_size: int
) -> dict[str, float]:
    """Generates once to warm up (a tenth of the prompts) and once measured, each on prompts not seen before."""
    generator = np.random.default_rng(sampling.seed)

    def draw(count: int) -> list[Prompt]:
        tokens = generator.integers(0, vocab_size, (count, prompt_tokens)).astype(np.int32)
        return [Prompt(id=i, tokens=row) for i, row in enumerate(tokens)]

    engine.generate(draw(max(1, prompts // 10)), sampling)
    asked = draw(prompts)
    started = time.perf_counter()
    found = engine.generate(asked, sampling)
    seconds = time.perf_counter() - started
    new = sum(len(completion.tokens) for completion in found)
    return {
        "prompts": prompts,
        "prompt_tokens": prompts * prompt_tokens,
        "new_tokens": new,
        "seconds": seconds,
        "new_tokens_per_second": new / seconds,
    }
