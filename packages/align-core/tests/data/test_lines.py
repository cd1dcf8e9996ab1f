"""A file is indexed, not loaded: any record at once, in little memory, and noticed when it is another file."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from align_core.data.lines import LineRecords, Row
from align_core.errors import DataError

MEASURE = """
import resource, sys
from pathlib import Path
from align_core.data.records import read_sft

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

before = peak()
records = read_sft(Path(sys.argv[1]))
order = records.order(batch_size=64, seed=0)
for step in range(20):
    assert all(len(records[int(i)].response) > 1000 for i in order(step))
print(len(records), peak() - before)
"""


def text(row: Row) -> str:
    value = row["text"]
    if not isinstance(value, str):
        raise DataError("'text' must be a text")
    return value


def write(path: Path, *lines: str) -> Path:
    path.write_bytes("\n".join(lines).encode("utf-8"))
    return path


def test_any_record_is_read_by_its_place(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"{'é' * (i % 7)}{i}"}, ensure_ascii=False) for i in range(50)]
    records = LineRecords(write(tmp_path / "f", "", *lines[:20], "   ", "\r", *lines[20:]), text, expected="text")
    assert len(records) == 50
    for i in (0, 49, 20, 19, 7, -1):
        assert records[i] == json.loads(lines[i])["text"]
    assert records[3:5] == ["ééé3", "éééé4"]
    assert [records.where(i) for i in (0, 20)] == [f"{tmp_path / 'f'}, line 2", f"{tmp_path / 'f'}, line 24"]
    with pytest.raises(IndexError):
        records[50]


def test_last_line_needs_no_end(tmp_path: Path) -> None:
    with_end, without = write(tmp_path / "a", '{"text": "1"}', ""), write(tmp_path / "b", '{"text": "1"}')
    assert LineRecords(with_end, text, expected="")[:] == LineRecords(without, text, expected="")[:] == ["1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no records; expected lines of text"),
        ("\n  \n", "holds no records"),
        ('[{"text": "1"}]', r"begins with '\[': a JSON array, not JSON lines"),
        ('{"text": "1"}\n{"text": 2}', "f, line 2: 'text' must be a text; expected text"),
        ('{"text": "1"}\n\n{"text": "2"', "f, line 3: Expecting"),
        ('{"text": "1"}\n{"text": "a\\ud83d b"}', r"f, line 2: '\\ud83d' is half of a surrogate pair and no character"),
        ('{"text": "1"}\n"2"', "f, line 2: a str, not an object"),
        ("[" * 0 + '{"text": ' + "[" * 100_000, "f, line 1: .*recursion"),
    ],
)
def test_bad_file_is_told_by_line(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        LineRecords(write(tmp_path / "f", content), text, expected="text")


def test_character_written_as_a_pair_of_surrogates_is_read(tmp_path: Path) -> None:
    records = LineRecords(write(tmp_path / "f", r'{"text": "\ud83d\ude00", "\\ud800": 1}'), text, expected="")
    assert records[:] == ["\U0001f600"]


def test_byte_that_is_no_utf8_has_a_line_number(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b'{"text": "1"}\n{"text": "\xff"}\n')
    with pytest.raises(DataError, match="f, line 2: 'utf-8' codec"):
        LineRecords(tmp_path / "f", text, expected="text")


def test_fingerprint_is_of_the_contents(tmp_path: Path) -> None:
    one, copy = (write(tmp_path / name, '{"text": "1"}', '{"text": "2"}') for name in ("one", "copy"))
    other = write(tmp_path / "other", '{"text": "1"}', '{"text": "3"}')
    found = [LineRecords(path, text, expected="").fingerprint() for path in (one, copy, other)]
    assert found[0] == found[1]
    assert found[0]["blake2b"] != found[2]["blake2b"]
    assert (found[0]["bytes"], found[0]["records"]) == (27, 2)


def test_file_that_changes_in_use_is_refused(tmp_path: Path) -> None:
    records = LineRecords(write(tmp_path / "f", '{"text": "1"}'), text, expected="")
    write(tmp_path / "f", '{"text": "22"}')
    with pytest.raises(DataError, match="was changed while it was in use"):
        records[0]


def test_big_file_stays_on_disk(tmp_path: Path) -> None:
    """120 MB of records: indexing, checking and 20 shuffled batches take less than a tenth of that."""
    path = tmp_path / "big.jsonl"
    line = json.dumps({"prompt": "p", "response": "x" * 1150}) + "\n"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(100):
            file.write(line * 1000)
    assert path.stat().st_size > 115e6
    shown = subprocess.run([sys.executable, "-c", MEASURE, str(path)], check=True, capture_output=True, text=True)
    records, grown_mib = shown.stdout.split()
    assert int(records) == 100_000
    assert float(grown_mib) < 12
