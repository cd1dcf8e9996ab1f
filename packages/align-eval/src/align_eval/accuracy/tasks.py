"""Reads the tasks of an accuracy evaluation: JSON lines of {"prompt", "answer"}, checked before any model starts.

Knows nothing of models or grading beyond asking whether the gold answer is usable.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from align_core.errors import ConfigError, DataError, choices
from align_eval.accuracy.math import parse_gold


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question and its right answer."""

    line: int
    """Line of the file, from 1; it identifies the task in the results."""
    content: str | list[Mapping[str, str]]
    """The user's words, or chat messages."""
    answer: str
    """The gold answer as the file has it."""
    gold: Fraction
    """Its value."""


def read_tasks(path: Path, *, limit: int | None = None) -> list[Task]:
    """The tasks of a JSON-lines file, in its order, the first `limit` of them.

    A record holds `prompt` (text) or `messages` (chat), and `answer`: a number, or a solution ending in `#### N`.

    Raises:
        DataError: the file is missing, empty, or a line is not such a record (named with its line number).
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be greater than 0, got {limit}")
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist")
    tasks: list[Task] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(tasks) == limit:
                break
            if line.strip():
                tasks.append(_task(line, number=number, where=f"{path}, line {number}"))
    if not tasks:
        raise DataError(f'data file {str(path)!r} holds no records; expected JSON lines of {{"prompt", "answer"}}')
    return tasks


def _task(line: str, *, number: int, where: str) -> Task:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict):
        raise DataError(f'{where}: expected an object {{"prompt", "answer"}}, got {type(record).__name__}')
    content = _content(record, where=where)
    if "answer" not in record:
        raise DataError(f"{where}: no 'answer', only {choices(record)}")
    gold = parse_gold(record["answer"])
    if gold is None:
        raise DataError(
            f"{where}: the answer {str(record['answer'])[:80]!r} names no number; "
            "give a number or a solution ending in '#### N'"
        )
    return Task(line=number, content=content, answer=str(record["answer"]), gold=gold)


def _content(record: dict[str, object], *, where: str) -> str | list[Mapping[str, str]]:
    content = record.get("prompt", record.get("messages"))
    if isinstance(content, str) and content.strip():
        return content
    if isinstance(content, list) and content and all(_is_message(message) for message in content):
        return content
    raise DataError(
        f"{where}: expected 'prompt' (text) or 'messages' (a list of {{'role', 'content'}}), got {choices(record)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
