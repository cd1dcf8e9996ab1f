"""Reading tasks: what is accepted, and what each bad line says."""

import json
from pathlib import Path

import pytest

from align_core.errors import ConfigError, DataError
from align_eval.accuracy.tasks import read_tasks


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prompts_messages_and_solutions_are_read(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "1+1"}]
    path = _write(
        tmp_path / "data.jsonl",
        json.dumps({"prompt": "1+1", "answer": 2, "source": "kept"}),
        "",
        json.dumps({"messages": messages, "answer": "1+1=2\n#### 2"}),
    )
    first, second = read_tasks(path)
    assert (first.line, first.content, first.gold) == (1, "1+1", "2")
    assert (second.line, second.content, second.gold) == (3, messages, "1+1=2\n#### 2")
    assert first.record["source"] == "kept"


def test_limit_takes_the_first_and_reads_no_further(tmp_path: Path) -> None:
    path = _write(tmp_path / "data.jsonl", '{"prompt": "1+1", "answer": "2"}', "not json")
    assert len(read_tasks(path, limit=1)) == 1
    with pytest.raises(ConfigError, match="limit must be greater than 0, got 0"):
        read_tasks(path, limit=0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "not JSON"),
        ("[1]", "expected an object, got list"),
        ('{"text": "1+1", "answer": "2"}', "expected 'prompt' .*, got 'answer' or 'text'"),
        ('{"prompt": "  ", "answer": "2"}', "expected 'prompt'"),
        ('{"messages": [{"role": "user"}], "answer": "2"}', "expected 'prompt'"),
        ('{"prompt": "1+1"}', "no 'answer', only 'prompt'"),
        ('{"prompt": "1+1", "answer": "two"}', "the answer 'two' names no number"),
        ('{"prompt": "1+1", "answer": null}', "the answer 'None' names no number"),
    ],
)
def test_bad_line_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = _write(tmp_path / "data.jsonl", '{"prompt": "1+1", "answer": "2"}', line)
    with pytest.raises(DataError, match=f"data.jsonl, line 2: {message}"):
        read_tasks(path)


def test_missing_and_empty_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_tasks(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no records"):
        read_tasks(_write(tmp_path / "empty.jsonl", ""))
