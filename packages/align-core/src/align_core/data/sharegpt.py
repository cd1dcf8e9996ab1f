"""Conversations in ShareGPT's form, with or without a preferred and a rejected last answer, to the stages' records.

    {"conversations": [{"from": "human"|"gpt"|"system", "value": TEXT}, ...]}
    the same and {"chosen": {"from": "gpt", "value": TEXT}, "rejected": {...}} (LLaMA-Factory's form)

A file is one JSON array, or JSON lines.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from align_core.data.json_text import parse_json
from align_core.errors import DataError

Messages = list[dict[str, str]]
Row = Mapping[str, object]

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def read_sharegpt(source: Path) -> list[dict[str, Any]]:
    """The rows of a file; all of it is held in memory.

    Raises:
        DataError: no JSON, or a row that is not of that form.
    """
    rows = _parse(source)
    for number, row in enumerate(rows):
        try:
            _messages(row)
        except DataError as error:
            raise DataError(f"{source}, conversation {number}: {error}") from error
    return rows


def _parse(source: Path) -> list[Any]:
    text, where = source.read_bytes(), str(source)
    try:
        if text.lstrip().startswith(b"["):
            return list(cast("list[Any]", parse_json(text)))
        rows = []
        for number, line in enumerate(text.split(b"\n"), start=1):
            where = f"{source}, line {number}"
            if line.strip():
                rows.append(parse_json(line))
        return rows
    except DataError as error:
        raise DataError(f"{where}: {error}; expected a JSON array or JSON lines") from error


def sharegpt_files(train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> dict[str, list[Row]]:
    """The stages' files: `sft` and `test_sft` of conversations, `preferences` and `test_preferences` of pairs."""
    files: dict[str, list[Row]] = {}
    for prefix, rows in (("", train), ("test_", test)):
        pairs = [row for row in rows if "chosen" in row]
        talks = [row for row in rows if "chosen" not in row]
        if talks:
            files[f"{prefix}sft"] = list(_conversations(talks))
        if pairs:
            files[f"{prefix}preferences"] = [_pair(row) for row in pairs]
    files["prompts"] = [{"prompt": _until_user(_messages(row))} for row in train]
    files["test"] = [{"prompt": _until_user(_messages(row))} for row in test]
    return files


def _conversations(rows: Iterable[dict[str, Any]]) -> Iterable[Row]:
    """Up to the last answer: what a person says after it teaches nothing."""
    for row in rows:
        messages = _messages(row)
        while messages[-1]["role"] != "assistant":
            messages.pop()
        yield {"messages": messages}


def _pair(row: dict[str, Any]) -> Row:
    prompt = _messages({"conversations": row["conversations"]}, open_ended=True)
    return {"prompt": prompt, "chosen": _turn(row["chosen"])["content"], "rejected": _turn(row["rejected"])["content"]}


def _until_user(messages: Messages) -> Messages:
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "user")
    return messages[: last + 1]


def _messages(row: object, *, open_ended: bool = False) -> Messages:
    """The turns; with an answer among them unless they are the prompt of a pair."""
    if not isinstance(row, dict) or not isinstance(row.get("conversations"), list):
        raise DataError(f"no list 'conversations' in {row!r:.200}")
    messages = [_turn(turn) for turn in row["conversations"]]
    wanted = ("user",) if open_ended or "chosen" in row else ("user", "assistant")
    for role in wanted:
        if not any(turn["role"] == role for turn in messages):
            raise DataError(f"no turn of the {role} in {row!r:.200}")
    return messages


def _turn(turn: object) -> dict[str, str]:
    if not isinstance(turn, dict) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise DataError(f"a turn must be {{'from': human, gpt or system, 'value': text}}, got {turn!r:.200}")
    return {"role": _ROLES[turn["from"]], "content": turn["value"]}
