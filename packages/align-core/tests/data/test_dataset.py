"""Several files as one data set, and what a step draws from it."""

import json
from pathlib import Path

import numpy as np
import pytest

from align_core.data.dataset import each_encoded, encoded
from align_core.data.records import SftRecord, read_sft
from align_core.errors import DataError


def write(path: Path, *prompts: str) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "response": "r"}) + "\n" for p in prompts), encoding="utf-8")
    return path


def test_files_follow_each_other(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "1", "2", "3"), write(tmp_path / "b", "4", "5")
    records = read_sft([str(a), str(b)])
    assert [record.prompt for record in records] == ["1", "2", "3", "4", "5"]
    assert records[-1].prompt == "5"
    assert [record.prompt for record in records[1:4]] == ["2", "3", "4"]
    assert [record.prompt for part in records.parts(2) for record in part] == ["1", "2", "3", "4", "5"]
    assert records.where(3) == f"{b}, line 1"
    assert [file["records"] for file in records.fingerprint()] == [3, 2]


def test_without_ratios_every_record_comes_once_an_epoch(tmp_path: Path) -> None:
    records = read_sft([str(write(tmp_path / "a", "1", "2", "3")), str(write(tmp_path / "b", "4"))])
    order = records.order(batch_size=2, seed=0)
    assert sorted(np.concatenate([order(0), order(1)]).tolist()) == [0, 1, 2, 3]


def test_ratios_decide_how_often_a_file_is_drawn(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", "1"), write(tmp_path / "b", *"23456789")
    order = read_sft([f"{a}:0.75", f"{b}:0.25"]).order(batch_size=4, seed=0)
    assert [sorted(order(step).tolist())[:3] for step in range(3)] == [[0, 0, 0]] * 3


def test_too_few_records_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 records are fewer than a batch of 3"):
        read_sft(write(tmp_path / "a", "1", "2")).order(batch_size=3, seed=0)


def test_error_of_an_encoder_names_the_line(tmp_path: Path) -> None:
    records = read_sft(write(tmp_path / "a", "1", "bad"))

    def encode(record: SftRecord) -> int:
        if record.prompt == "bad":
            raise DataError("no room")
        return 1

    assert encoded(records, 0, encode) == 1
    with pytest.raises(DataError, match="a, line 2: no room"):
        list(each_encoded(records, encode))
    assert list(each_encoded(records, encode, most=1)) == [1]


def test_what_is_looked_at_beforehand_is_of_every_file(tmp_path: Path) -> None:
    """Of 6 and 3 records 4: two thirds of it from the first file, rounded up as for the second."""
    a, b = write(tmp_path / "a", *"123456"), write(tmp_path / "b", *"789")
    records = read_sft([str(a), str(b)])
    looked_at = ["".join(map(str, each_encoded(records, lambda r: r.prompt, most=most))) for most in (4, 9, 100)]
    assert looked_at == ["12378", "123456789", "123456789"]
