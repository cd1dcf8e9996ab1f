"""The records of each task and how a row of their JSON-lines files is read.

A bad line is a DataError that names the file, the line and what was expected. Extra keys of a prompt are kept as
columns for its reward; those of other records are left out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from align_core.data.dataset import Dataset, open_dataset
from align_core.data.files import DataFiles
from align_core.data.lines import Row
from align_core.errors import DataError
from align_core.text import Messages

Content = str | Messages


@dataclass(frozen=True, kw_only=True, slots=True)
class SftRecord:
    """A prompt and the answer to imitate."""

    prompt: Content
    response: str


@dataclass(frozen=True, kw_only=True, slots=True)
class RankedRecord:
    """A prompt and its responses with scores; a higher score is better."""

    prompt: Content
    responses: Sequence[str]
    scores: Sequence[float]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreferenceRecord:
    """A prompt, the response that people prefer, and the one they do not."""

    prompt: Content
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MarkedRecord:
    """A prompt, one response, and whether such responses are wanted."""

    prompt: Content
    response: str
    desirable: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponsesRecord:
    """A prompt and responses to be scored, with the row that they came in."""

    prompt: Content
    responses: Sequence[str]
    row: Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRecord:
    """A prompt to sample for, and the columns that its reward needs."""

    prompt: Content
    columns: Mapping[str, object] = field(default_factory=dict)


def read_sft(data: DataFiles) -> Dataset[SftRecord]:
    """Records {"prompt"|"query", "response"} or {"messages": [...]} that end in the assistant's turn."""
    expected = '{"prompt", "response"} or {"messages": [...]}'
    return open_dataset(data, _sft, expected=expected, name_in_directory="sft.jsonl")


def read_ranked(data: DataFiles) -> Dataset[RankedRecord]:
    """Records {"prompt"|"query", "response": [...], "score": [...]} or {"prompt", "chosen", "rejected"}."""
    expected = '{"prompt", "response": [...], "score": [...]} or {"prompt", "chosen", "rejected"}'
    return open_dataset(data, _ranked, expected=expected, name_in_directory="preferences.jsonl")


def read_preferences(data: DataFiles) -> Dataset[PreferenceRecord]:
    """Records {"prompt"|"query", "chosen"|"response", "rejected"}."""
    expected = '{"prompt", "chosen", "rejected"}'
    return open_dataset(data, _preference, expected=expected, name_in_directory="preferences.jsonl")


def read_marked(data: DataFiles) -> Dataset[MarkedRecord]:
    """Records {"prompt"|"query", "response"|"completion", "label": true|false}."""
    expected = '{"prompt", "response", "label": true or false}'
    return open_dataset(data, _marked, expected=expected, name_in_directory="marked.jsonl")


def read_responses(data: DataFiles) -> Dataset[ResponsesRecord]:
    """Records {"prompt"|"query", "response"|"completion": text or list of texts} and any further columns."""
    expected = '{"prompt", "response": text or [texts]}'
    return open_dataset(data, _responses, expected=expected, name_in_directory="responses.jsonl")


def read_prompts(data: DataFiles) -> Dataset[PromptRecord]:
    """Records {"prompt"|"query"|"question"} or {"messages": [...]}, and any further columns."""
    expected = '{"prompt", ...} or {"messages": [...], ...}'
    return open_dataset(data, _prompt, expected=expected, name_in_directory="prompts.jsonl")


def _sft(row: Row) -> SftRecord:
    if "messages" in row:
        messages = _messages(row["messages"])
        if messages[-1]["role"] != "assistant" or not any(turn["role"] == "user" for turn in messages):
            raise DataError("'messages' must hold a user's turn and end in the assistant's")
        if not messages[-1]["content"]:
            raise DataError("the last turn of 'messages', which is to be learnt, is empty")
        return SftRecord(prompt=messages[:-1], response=messages[-1]["content"])
    return SftRecord(prompt=_content(row), response=_text(row, "response"))


def _ranked(row: Row) -> RankedRecord:
    if "chosen" in row:
        pair = _preference(row)
        return RankedRecord(prompt=pair.prompt, responses=[pair.chosen, pair.rejected], scores=[1.0, 0.0])
    responses, scores = row.get("response"), row.get("score")
    if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
        raise DataError("'response' must be a list of texts")
    if not isinstance(scores, list) or not all(isinstance(s, int | float) and math.isfinite(s) for s in scores):
        raise DataError("'score' must be a list of finite numbers")
    if len(scores) != len(responses) or len(responses) < 2:
        raise DataError(
            f"{len(responses)} responses with {len(scores)} scores; as many of both, at least two, are needed"
        )
    return RankedRecord(prompt=_content(row), responses=responses, scores=[float(s) for s in scores])


def _preference(row: Row) -> PreferenceRecord:
    return PreferenceRecord(
        prompt=_content(row), chosen=_text(row, "chosen", "response"), rejected=_text(row, "rejected")
    )


def _marked(row: Row) -> MarkedRecord:
    label = row.get("label")
    if not isinstance(label, bool):
        raise DataError(f"'label' must be true or false, got {label!r}")
    return MarkedRecord(prompt=_content(row), response=_text(row, "response", "completion"), desirable=label)


def _responses(row: Row) -> ResponsesRecord:
    responses = row.get("response")
    if isinstance(responses, list):
        if not responses or not all(isinstance(text, str) and text for text in responses):
            raise DataError("'response' must be a text or a list of texts, none of them empty")
        return ResponsesRecord(prompt=_content(row), responses=responses, row=row)
    return ResponsesRecord(prompt=_content(row), responses=[_text(row, "response", "completion")], row=row)


def _prompt(row: Row) -> PromptRecord:
    if "messages" in row:
        messages = _messages(row["messages"])
        if messages[-1]["role"] != "user":
            raise DataError(f"'messages' of a prompt must end in the user's turn, not the {messages[-1]['role']}'s")
        return PromptRecord(prompt=messages, columns={k: v for k, v in row.items() if k != "messages"})
    key = next((name for name in ("prompt", "query", "question") if name in row), "prompt")
    content = _content(row) if isinstance(row.get("prompt"), list) else _text(row, key)
    return PromptRecord(prompt=content, columns={k: v for k, v in row.items() if k != key})


def _content(row: Row) -> Content:
    """The prompt: a text, or chat messages under `prompt` that end in the user's turn."""
    if not isinstance(row.get("prompt"), list):
        return _text(row, "prompt", "query")
    messages = _messages(row["prompt"])
    if messages[-1]["role"] != "user":
        raise DataError(f"the turns of 'prompt' must end in the user's, not the {messages[-1]['role']}'s")
    return messages


def _text(row: Row, *spellings: str) -> str:
    for name in spellings:
        if name in row:
            value = row[name]
            if not isinstance(value, str) or not value:
                raise DataError(f"{name!r} must be a text that is not empty, got {value!r}")
            return value
    raise DataError(f"no {' or '.join(repr(name) for name in spellings)} among the keys {sorted(row)}")


def _messages(value: object) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise DataError("'messages' must be a list of turns that is not empty")
    for turn in value:
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str):
            raise DataError("each turn of 'messages' must be {'role', 'content'} with texts")
        if turn.get("role") not in ("system", "user", "assistant"):
            raise DataError(f"role {turn.get('role')!r} of a turn is none of 'assistant', 'system' or 'user'")
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]
