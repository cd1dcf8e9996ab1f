"""What every engine does with a request before it samples: seeds and checks of the prompts. Pure; knows no engine."""

import hashlib
from collections.abc import Sequence

from align_core.config import SamplingConfig
from align_core.errors import DataError
from align_core.types import Prompt


def completion_seed(*, seed: int, prompt_id: int, sample: int, begun: int = 0) -> int:
    """Seed in [0, 2^63) of one completion: equal for equal arguments, whatever else is in the batch.

    A hash, not a sum: seed 1 of prompt 2 and seed 2 of prompt 1 must not draw the same numbers.

    Args:
        begun: tokens that it has already; what follows must not repeat the draws that gave them.
    """
    text = (f"{seed}/{prompt_id}/{sample}" + (f"/{begun}" if begun else "")).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def check_prompts(prompts: Sequence[Prompt], sampling: SamplingConfig, *, context: int, vocab_size: int) -> None:
    """Raises DataError that names the first prompt the engine cannot take, and the remedy.

    Args:
        context: longest prompt plus completion, tokens.
        vocab_size: token ids lie in [0, vocab_size).
    """
    seen: set[int] = set()
    for prompt in prompts:
        length = len(prompt.tokens)
        if prompt.id in seen:
            raise DataError(f"prompt id {prompt.id} occurs twice in one call; give every drawn prompt an id of its own")
        seen.add(prompt.id)
        if length == 0:
            raise DataError(f"prompt {prompt.id} is empty; a prompt has at least one token")
        new = sampling.max_tokens if prompt.max_tokens is None else prompt.max_tokens
        if new < 1:
            raise DataError(f"prompt {prompt.id} allows {new} new tokens; a completion has at least one")
        if length + new > context:
            raise DataError(
                f"prompt {prompt.id} has {length} tokens, which leaves no room for {new} new ones in a "
                f"context of {context}; shorten it to {max(0, context - new)}, lower "
                "sampling.max_tokens or raise engine.context"
            )
        low, high = int(prompt.tokens.min()), int(prompt.tokens.max())
        if low < 0 or high >= vocab_size:
            raise DataError(
                f"prompt {prompt.id} has token id {low if low < 0 else high}, but the model's vocabulary is "
                f"0 .. {vocab_size - 1}; tokenize with the model's own tokenizer"
            )
