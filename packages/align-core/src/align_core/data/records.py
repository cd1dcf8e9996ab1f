"""The records of each task and the reader of their JSON-lines files.

A bad line is a DataError that names the file, the line and what was expected. Extra keys of a prompt are kept as
columns for its reward; those of other records are left out.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from align_core.errors import DataError
from align_core.text import Messages

Content = str | Messages
Record = TypeVar("Record")


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
class PromptRecord:
    """A prompt to sample for, and the columns that its reward needs."""

    prompt: Content
    columns: Mapping[str, object] = field(default_factory=dict)


def read_sft(path: Path) -> list[SftRecord]:
    """Records {"prompt"|"query", "response"} or {"messages": [...]} that end in the assistant's turn."""
    return _read(path, _sft, expected='{"prompt", "response"} or {"messages": [...]}')


def read_ranked(path: Path) -> list[RankedRecord]:
    """Records {"prompt"|"query", "response": [...], "score": [...]} or {"prompt", "chosen", "rejected"}."""
    return _read(
        path, _ranked, expected='{"prompt", "response": [...], "score": [...]} or {"prompt", "chosen", "rejected"}'
    )


def read_preferences(path: Path) -> list[PreferenceRecord]:
    """Records {"prompt"|"query", "chosen"|"response", "rejected"}."""
    return _read(path, _preference, expected='{"prompt", "chosen", "rejected"}')


def read_prompts(path: Path) -> list[PromptRecord]:
    """Records {"prompt"|"query"|"question"} or {"messages": [...]}, and any further columns."""
    return _read(path, _prompt, expected='{"prompt", ...} or {"messages": [...], ...}')


def _read(path: Path, parse: Callable[[dict[str, object]], Record], *, expected: str) -> list[Record]:
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist; give a JSON-lines file of {expected}")
    records: list[Record] = []
    with path.open("rb") as lines:  # decoded line by line, so that a byte that is not UTF-8 has a line number
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                if not isinstance(row, dict):
                    raise DataError(f"a {type(row).__name__}, not an object")
                records.append(parse(row))
            except (json.JSONDecodeError, DataError, UnicodeDecodeError) as error:
                raise DataError(f"{path}, line {number}: {error}; expected {expected}") from error
    if not records:
        raise DataError(f"{path} holds no records; expected lines of {expected}")
    return records


def _sft(row: dict[str, object]) -> SftRecord:
    if "messages" in row:
        messages = _messages(row["messages"])
        if messages[-1]["role"] != "assistant" or not any(turn["role"] == "user" for turn in messages):
            raise DataError("'messages' must hold a user's turn and end in the assistant's")
        if not messages[-1]["content"]:
            raise DataError("the last turn of 'messages', which is to be learnt, is empty")
        return SftRecord(prompt=messages[:-1], response=messages[-1]["content"])
    return SftRecord(prompt=_text(row, "prompt", "query"), response=_text(row, "response"))


def _ranked(row: dict[str, object]) -> RankedRecord:
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
    return RankedRecord(prompt=_text(row, "prompt", "query"), responses=responses, scores=[float(s) for s in scores])


def _preference(row: dict[str, object]) -> PreferenceRecord:
    return PreferenceRecord(
        prompt=_text(row, "prompt", "query"), chosen=_text(row, "chosen", "response"), rejected=_text(row, "rejected")
    )


def _prompt(row: dict[str, object]) -> PromptRecord:
    if "messages" in row:
        messages = _messages(row["messages"])
        if messages[-1]["role"] != "user":
            raise DataError(f"'messages' of a prompt must end in the user's turn, not the {messages[-1]['role']}'s")
        return PromptRecord(prompt=messages, columns={k: v for k, v in row.items() if k != "messages"})
    key = next((name for name in ("prompt", "query", "question") if name in row), "prompt")
    return PromptRecord(prompt=_text(row, key), columns={k: v for k, v in row.items() if k != key})


def _text(row: dict[str, object], *spellings: str) -> str:
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
