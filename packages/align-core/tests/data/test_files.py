"""Which files `data` names: one, a directory, or several with ratios."""

from pathlib import Path

import pytest

from align_core.data.files import DataFile, data_files
from align_core.errors import DataError


def files(data: Path | list[str]) -> list[DataFile]:
    return data_files(data, name_in_directory="sft.jsonl")


@pytest.fixture
def here(tmp_path: Path) -> Path:
    for name in ("a.jsonl", "b.jsonl", "odd:name", "data/sft.jsonl", "other/prompts.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_one_file_and_the_file_of_a_directory(here: Path) -> None:
    assert files(here / "a.jsonl") == [DataFile(path=here / "a.jsonl")]
    assert files(here / "data") == [DataFile(path=here / "data" / "sft.jsonl")]
    assert files(here / "odd:name") == [DataFile(path=here / "odd:name")]
    assert files(here / "nowhere") == [DataFile(path=here / "nowhere")]  # the reader says so, with what it expects


def test_several_files_with_ratios(here: Path) -> None:
    assert files([f"{here}/a.jsonl:0.7", f"{here}/data:3"]) == [
        DataFile(path=here / "a.jsonl", ratio=0.7),
        DataFile(path=here / "data" / "sft.jsonl", ratio=3.0),
    ]
    assert [file.ratio for file in files([f"{here}/a.jsonl", f"{here}/b.jsonl"])] == [None, None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no data file is given"),
        (["a.jsonl:0.7", "b.jsonl"], "'b.jsonl' have none; give all of them one, or none"),
        (["a.jsonl:0"], "ratio of 'a.jsonl:0' must be greater than 0"),
        (["a.jsonl:nan"], "must be greater than 0 and finite, got nan"),
        (["a.jsonl:inf"], "must be greater than 0 and finite"),
        (["a.jsonl:much"], "'a.jsonl:much' does not exist"),
        (["other"], "data directory 'other' has no 'sft.jsonl'; give one of 'prompts.jsonl'"),
    ],
)
def test_bad_names_and_ratios(here: Path, data: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    with pytest.raises(DataError, match=message):
        files(data)
