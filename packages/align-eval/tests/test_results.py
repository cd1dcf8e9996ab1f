"""Atomic writing: the target is either the old file or the new one."""

import json
from pathlib import Path

import pytest

from align_eval.results import write_json, write_json_lines


def test_files_are_written_and_folders_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    write_json_lines(tmp_path / "a" / "b.jsonl", [{"x": "\u00e9"}, {"x": 2}])
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": 1}
    assert (tmp_path / "a" / "b.jsonl").read_text(encoding="utf-8") == '{"x": "\u00e9"}\n{"x": 2}\n'
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["b.json", "b.jsonl"]


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "b.json"
    write_json(path, {"x": 1})

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("align_eval.results.os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["b.json"]
