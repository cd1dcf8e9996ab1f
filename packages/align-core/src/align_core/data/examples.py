"""Records to token sequences: prompt and response in one array, with a mask on what is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align_core.data.records import Content, RankedRecord, SftRecord
from align_core.errors import DataError
from align_core.text import Tokenizer, encode_response, render_prompt
from align_core.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence: prompt, then response."""

    tokens: NDArray[np.int32]
    """int32 [L]."""
    mask: NDArray[np.bool_]
    """bool [L], True on the response."""


def encode_example(tokenizer: Tokenizer, prompt: Content, response: str, *, template: str, max_length: int) -> Example:
    """Prompt and response of at most `max_length` tokens.

    A response longer than half the room is cut at the right when the prompt needs the rest; a prompt that is still
    too long is cut at the left of its content, so that the template's closing tag always stays.
    """
    answer = encode_response(tokenizer, response, template=template)
    room_for_answer = max(max_length // 2, max_length - len(_prompt_tokens(tokenizer, prompt, template, max_length)))
    answer = answer[:room_for_answer]
    question = _prompt_tokens(tokenizer, prompt, template, max_length - len(answer))
    tokens = np.concatenate([question, answer])
    return Example(tokens=tokens, mask=np.arange(len(tokens)) >= len(question))


def sft_examples(
    tokenizer: Tokenizer, records: Sequence[SftRecord], *, template: str, max_length: int
) -> list[Example]:
    """One example a record."""
    return [encode_example(tokenizer, r.prompt, r.response, template=template, max_length=max_length) for r in records]


def ranked_examples(
    tokenizer: Tokenizer, records: Sequence[RankedRecord], *, template: str, max_length: int
) -> list[list[Example]]:
    """The examples of each record's responses, in their order."""
    return [
        [encode_example(tokenizer, r.prompt, text, template=template, max_length=max_length) for text in r.responses]
        for r in records
    ]


def batch_of(examples: Sequence[Example]) -> Batch:
    """Examples end to end, with the column `mask`."""
    return Batch.of([e.tokens for e in examples], tokens={"mask": [e.mask for e in examples]})


def _prompt_tokens(tokenizer: Tokenizer, prompt: Content, template: str, max_tokens: int) -> NDArray[np.int32]:
    if max_tokens < 1:
        raise DataError("no room is left for a prompt; raise max_length")
    return render_prompt(tokenizer, prompt, template=template, max_tokens=max_tokens)
