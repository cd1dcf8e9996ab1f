"""Every accepted spelling of a record, and what a bad line is told: file, line and what was expected."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align_core.data.records import (
    PreferenceRecord,
    PromptRecord,
    RankedRecord,
    SftRecord,
    read_preferences,
    read_prompts,
    read_ranked,
    read_sft,
)
from align_core.errors import DataError

USER, REPLY = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}
SYSTEM = {"role": "system", "content": "Add."}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p", "response": "r"}, SftRecord(prompt="p", response="r")),
        ({"query": "p", "response": "r", "source": "web"}, SftRecord(prompt="p", response="r")),
        ({"messages": [USER, REPLY]}, SftRecord(prompt=[USER], response="2")),
        ({"messages": [SYSTEM, USER, REPLY, USER, REPLY]}, SftRecord(prompt=[SYSTEM, USER, REPLY, USER], response="2")),
    ],
)
def test_sft_spellings(tmp_path: Path, row: object, record: SftRecord) -> None:
    assert list(read_sft(write(tmp_path / "f.jsonl", row))) == [record]


@pytest.mark.parametrize(
    ("row", "record"),
    [
        (
            {"query": "p", "response": ["a", "b", "c"], "score": [0.5, 1, -2.25]},
            RankedRecord(prompt="p", responses=["a", "b", "c"], scores=[0.5, 1.0, -2.25]),
        ),
        (
            {"prompt": "p", "response": ["a", "b"], "score": [1, 0]},
            RankedRecord(prompt="p", responses=["a", "b"], scores=[1.0, 0.0]),
        ),
        (
            {"prompt": "p", "chosen": "a", "rejected": "b"},
            RankedRecord(prompt="p", responses=["a", "b"], scores=[1.0, 0.0]),
        ),
    ],
)
def test_reward_spellings(tmp_path: Path, row: object, record: RankedRecord) -> None:
    assert list(read_ranked(write(tmp_path / "f.jsonl", row))) == [record]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": "p", "response": "a", "rejected": "b"},
        {"query": "p", "chosen": "a", "rejected": "b"},
    ],
)
def test_preference_spellings(tmp_path: Path, row: object) -> None:
    expected = PreferenceRecord(prompt="p", chosen="a", rejected="b")
    assert list(read_preferences(write(tmp_path / "f.jsonl", row))) == [expected]


@pytest.mark.parametrize(
    ("row", "record"),
    [
        ({"prompt": "p"}, PromptRecord(prompt="p")),
        ({"messages": [SYSTEM, USER], "answer": 2}, PromptRecord(prompt=[SYSTEM, USER], columns={"answer": 2})),
        (
            {"prompt": "p", "answer": "so #### 2", "eval_func": "math_rule"},
            PromptRecord(prompt="p", columns={"answer": "so #### 2", "eval_func": "math_rule"}),
        ),
        ({"question": "p", "answer": "2"}, PromptRecord(prompt="p", columns={"answer": "2"})),
        ({"prompt": "p", "question": "q"}, PromptRecord(prompt="p", columns={"question": "q"})),
    ],
)
def test_prompt_spellings_keep_the_other_columns(tmp_path: Path, row: object, record: PromptRecord) -> None:
    assert list(read_prompts(write(tmp_path / "f.jsonl", row))) == [record]


@pytest.mark.parametrize(
    ("read", "row", "complaint"),
    [
        (read_sft, {"prompt": "p"}, r"no 'response' among the keys \['prompt'\]; expected \{"),
        (read_sft, {"text": "p"}, r"no 'prompt' or 'query' among the keys \['text'\]"),
        (read_sft, {"prompt": "", "response": "r"}, "'prompt' must be a text that is not empty, got ''"),
        (read_sft, {"prompt": "p", "response": 3}, "'response' must be a text that is not empty, got 3"),
        (read_sft, ["p", "r"], "a list, not an object"),
        (read_sft, {"messages": [USER]}, "must hold a user's turn and end in the assistant's"),
        (read_sft, {"messages": [SYSTEM, REPLY]}, "must hold a user's turn and end in the assistant's"),
        (read_sft, {"messages": [USER, {**REPLY, "content": ""}]}, "the last turn of 'messages', .* is empty"),
        (read_sft, {"messages": []}, "must be a list of turns that is not empty"),
        (read_sft, {"messages": [{"role": "user"}]}, "each turn of 'messages' must be"),
        (read_sft, {"messages": [{"role": "tool", "content": "x"}, REPLY]}, "role 'tool' of a turn is none of"),
        (read_ranked, {"prompt": "p", "response": "a", "score": 1}, "'response' must be a list of texts"),
        (read_ranked, {"prompt": "p", "response": ["a", 1], "score": [1, 2]}, "'response' must be a list of texts"),
        (read_ranked, {"prompt": "p", "response": ["a", "b"], "score": "12"}, "'score' must be a list of finite"),
        (read_ranked, {"prompt": "p", "response": ["a", "b"], "score": [1, float("nan")]}, "list of finite numbers"),
        (read_ranked, {"prompt": "p", "response": ["a", "b"], "score": [1]}, "2 responses with 1 scores"),
        (read_ranked, {"prompt": "p", "response": ["a"], "score": [1]}, "at least two, are needed"),
        (read_preferences, {"prompt": "p", "chosen": "a"}, "no 'rejected' among the keys"),
        (read_prompts, {"answer": "2"}, r"no 'prompt' among the keys \['answer'\]"),
        (read_prompts, {"messages": [USER, REPLY]}, "must end in the user's turn, not the assistant's"),
    ],
)
def test_bad_record_is_an_error_with_file_and_line(
    tmp_path: Path, read: Callable[[Path], object], row: object, complaint: str
) -> None:
    good = {
        read_sft: {"prompt": "p", "response": "r"},
        read_ranked: {"prompt": "p", "chosen": "a", "rejected": "b"},
        read_preferences: {"prompt": "p", "chosen": "a", "rejected": "b"},
        read_prompts: {"prompt": "p"},
    }[read]
    path = write(tmp_path / "f.jsonl", good, good, row)
    with pytest.raises(DataError, match=complaint) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")
    assert "; expected {" in str(caught.value)


@pytest.mark.parametrize("line", [b'{"prompt": "p"', b'{"prompt": "caf\xe9"}', b"prompt"])
def test_line_that_is_no_json_or_no_utf8_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes(b'{"prompt": "p"}\n\n' + line + b"\n")
    with pytest.raises(DataError, match=r"f.jsonl, line 3: .*; expected \{"):
        read_prompts(path)


def test_blank_lines_and_other_line_ends_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_bytes('{"prompt": "caf\u00e9"}\r\n\r\n  \n{"prompt": "q"}'.encode())
    assert [record.prompt for record in read_prompts(path)] == ["caf\u00e9", "q"]


def test_missing_and_empty_files_are_named_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data file '.*nowhere.jsonl' does not exist; give a JSON-lines file of \{"):
        read_sft(tmp_path / "nowhere.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty.jsonl holds no records; expected lines of \{"):
        read_sft(tmp_path / "empty.jsonl")
