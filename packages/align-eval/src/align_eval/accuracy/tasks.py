"""Reads the tasks of an accuracy evaluation: JSON lines, every line checked before any model starts.

Prompts may be called `prompt`, `query`, `question` (GSM8K) or `problem` (MATH), or be chat `messages`; all other fields
stay with the task, for the verifier. Knows nothing of models or grading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from align_core.errors import ConfigError, DataError, choices
from align_eval.accuracy.verifiers import Columns, NumberVerifier, Verifier
from align_eval.json_lines import read_rows

_PROMPTS = ("prompt", "query", "question", "problem")


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One question and what its verifier needs."""

    line: int
    """Line of the file, from 1; it identifies the task in the results."""
    content: str | list[Mapping[str, str]]
    """The user's words, or chat messages."""
    gold: str
    """The right answer as people read it."""
    record: Columns
    """The whole line."""


def read_tasks(
    path: Path, verifier: Verifier | None = None, *, limit: int | None = None, suffix: str = ""
) -> list[Task]:
    """The tasks of a JSON-lines file, in its order, the first `limit` of them.

    Args:
        verifier: checks each record; left out, records need a numeric `answer`.
        suffix: comes after the user's words, for example how the answer is to be given.

    Raises:
        DataError: the file is missing, empty, or a line is not such a record (named with its line number).
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be greater than 0, got {limit}")
    if not path.is_file():
        raise DataError(f"data file {str(path)!r} does not exist")
    check = verifier or NumberVerifier()
    tasks: list[Task] = []
    for number, where, record in islice(read_rows(path), limit):
        content = _content(record, where=where, suffix=suffix)
        try:
            gold = check.gold(record)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        tasks.append(Task(line=number, content=content, gold=gold, record=record))
    if not tasks:
        raise DataError(f'data file {str(path)!r} holds no records; expected JSON lines of {{"prompt", "answer"}}')
    return tasks


def _content(record: Columns, *, where: str, suffix: str) -> str | list[Mapping[str, str]]:
    words = next((record[name] for name in _PROMPTS if name in record), None)
    if isinstance(words, str) and words.strip():
        return words + suffix
    messages = record.get("messages")
    if isinstance(messages, list) and messages and all(_is_message(message) for message in messages):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + suffix}]
    raise DataError(
        f"{where}: expected 'prompt' (or {choices(_PROMPTS[1:])}; text) or 'messages' (a list of "
        f"{{'role', 'content'}}), got {choices(record)}"
    )


def _is_message(message: object) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
