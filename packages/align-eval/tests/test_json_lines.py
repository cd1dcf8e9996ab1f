"""Reading of JSON lines: a bad line is told with its place."""

from pathlib import Path

import pytest

from align_core.errors import DataError
from align_eval.json_lines import read_rows


def test_line_that_is_not_utf8_is_told_with_its_place(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"d\.jsonl, line 2: not UTF-8 \(byte 11 of the line\)"):
        list(read_rows(file))
