"""Records to token sequences: prompt and response in one array, with a mask on what is learnt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from align_core.data.records import Content, PreferenceRecord, RankedRecord, SftRecord
from align_core.errors import DataError
from align_core.text import Messages, RenderedPrompt, Tokenizer, encode_conversation, encode_response, fit_prompt
from align_core.types import Batch

Pair = tuple["Example", "Example"]
"""Chosen and rejected."""

Cut = Literal["exchanges", "prompt", "answer"]
"""What did not fit: a chat's oldest exchanges, the beginning of a prompt's content, the end of an answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence: prompt, then response; or a conversation with several of both."""

    tokens: NDArray[np.int32]
    """int32 [L]."""
    mask: NDArray[np.bool_]
    """bool [L], True on what the assistant says."""
    cut: frozenset[Cut] = frozenset()
    """What was left out to make it fit."""


def encode_example(tokenizer: Tokenizer, prompt: Content, response: str, *, template: str, max_length: int) -> Example:
    """Prompt and response of at most `max_length` tokens, cut as `encode_responses` does."""
    return encode_responses(tokenizer, prompt, [response], template=template, max_length=max_length)[0]


def encode_responses(
    tokenizer: Tokenizer, prompt: Content, responses: Sequence[str], *, template: str, max_length: int
) -> list[Example]:
    """Each response after the same prompt, at most `max_length` tokens together.

    A response longer than half the room is cut at the right when the prompt needs the rest; a prompt that is still
    too long beside the longest response is cut at the left of its content, so that the template's closing tag always
    stays.
    """
    whole = [encode_response(tokenizer, text, template=template) for text in responses]
    question = _prompt(tokenizer, prompt, template, max_length)
    room_for_answer = max(max_length // 2, max_length - len(question.tokens))
    answers = [answer[:room_for_answer] for answer in whole]
    room_for_question = max_length - max(map(len, answers))
    if len(question.tokens) > room_for_question:
        question = _prompt(tokenizer, prompt, template, room_for_question)
    head = question.tokens
    return [
        Example(
            tokens=np.concatenate([head, answer]),
            mask=np.arange(len(head) + len(answer)) >= len(head),
            cut=_cut(prompt=question.is_cut, answer=len(answer) < len(full)),
        )
        for answer, full in zip(answers, whole)
    ]


def encode_sft(
    tokenizer: Tokenizer, record: SftRecord, *, template: str, max_length: int, turns: Literal["all", "last"] = "all"
) -> Example:
    """A demonstration. Of a chat that is too long, the oldest exchanges are left out until the rest fits.

    Args:
        turns: whether the earlier turns of the assistant are learnt too.
    """
    several = not isinstance(record.prompt, str) and any(turn["role"] == "assistant" for turn in record.prompt)
    if several and turns == "all":
        messages: Messages = [*record.prompt, {"role": "assistant", "content": record.response}]
        left_out: frozenset[Cut] = frozenset()
        while sum(turn["role"] == "assistant" for turn in messages) > 1:
            tokens, mask = encode_conversation(tokenizer, messages, template=template)
            if len(tokens) <= max_length:
                return Example(tokens=tokens, mask=mask, cut=left_out)
            messages, left_out = _without_oldest_exchange(messages), frozenset({"exchanges"})
        alone = encode_example(tokenizer, messages[:-1], record.response, template=template, max_length=max_length)
        return replace(alone, cut=alone.cut | left_out)
    return encode_example(tokenizer, record.prompt, record.response, template=template, max_length=max_length)


def encode_ranked(tokenizer: Tokenizer, record: RankedRecord, *, template: str, max_length: int) -> list[Example]:
    """The examples of a record's responses, in their order."""
    return encode_responses(tokenizer, record.prompt, record.responses, template=template, max_length=max_length)


def encode_pair(tokenizer: Tokenizer, record: PreferenceRecord, *, template: str, max_length: int) -> Pair:
    """Chosen and rejected."""
    responses = [record.chosen, record.rejected]
    chosen, rejected = encode_responses(tokenizer, record.prompt, responses, template=template, max_length=max_length)
    return chosen, rejected


def prompt_example(prompt: RenderedPrompt) -> Example:
    """A prompt alone: nothing of it is learnt."""
    return Example(tokens=prompt.tokens, mask=np.zeros(len(prompt.tokens), np.bool_), cut=_cut(prompt=prompt.is_cut))


def batch_of(examples: Sequence[Example]) -> Batch:
    """Examples end to end, with the column `mask`."""
    return Batch.of([e.tokens for e in examples], tokens={"mask": [e.mask for e in examples]})


def _without_oldest_exchange(messages: Messages) -> Messages:
    """Without the first user's turn and what answers it; the system's turns stay."""
    system = [turn for turn in messages if turn["role"] == "system"]
    talk = [turn for turn in messages if turn["role"] != "system"]
    following = next(i for i, turn in enumerate(talk) if i and talk[i - 1]["role"] == "assistant")
    return [*system, *talk[following:]]


def _prompt(tokenizer: Tokenizer, prompt: Content, template: str, max_tokens: int) -> RenderedPrompt:
    if max_tokens < 1:
        raise DataError("no room is left for a prompt; raise max_length")
    return fit_prompt(tokenizer, prompt, template=template, max_tokens=max_tokens)


def _cut(*, prompt: bool, answer: bool = False) -> frozenset[Cut]:
    flags: dict[Cut, bool] = {"prompt": prompt, "answer": answer}
    return frozenset(what for what, is_cut in flags.items() if is_cut)
