"""`align data prepare`: the stages' files from the public originals."""

import gzip
import json
import random
import re
from pathlib import Path

import pytest

from align_core.cli import main
from align_core.data.prepare import prepare
from align_core.data.records import read_marked, read_preferences, read_prompts, read_ranked, read_sft
from align_core.errors import DataError

FILES = {"sft", "preferences", "marked", "prompts", "test", "test_preferences", "test_marked"}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def gsm8k(count: int) -> list[dict[str, str]]:
    solution = "{n} + 1000 = <<{n}+1000={sum}>>{sum} apples\n#### {sum:,}"
    return [
        {"question": f"Tom has {n} apples and buys 1000. How many?", "answer": solution.format(n=n, sum=n + 1000)}
        for n in range(count)
    ]


def hh(count: int) -> list[dict[str, str]]:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {}?\n\nAssistant:"
    return [{"chosen": f"{start.format(n)} yes", "rejected": f"{start.format(n)} no"} for n in range(count)]


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_readable(out: Path, *more: str) -> None:
    assert {path.stem for path in out.iterdir()} == FILES | set(more)
    read_sft(out / "sft.jsonl")
    read_ranked(out / "preferences.jsonl")
    read_preferences(out / "test_preferences.jsonl")
    assert len(read_marked(out / "marked.jsonl")) == 2 * len(read_preferences(out / "preferences.jsonl"))
    read_prompts(out / "prompts.jsonl")
    read_prompts(out / "test.jsonl")


def test_gsm8k_files_hold_worked_solutions_and_keep_the_test_apart(tmp_path: Path) -> None:
    source, out = write(tmp_path / "train.jsonl", gsm8k(30)), tmp_path / "out"
    assert main(["data", "prepare", "gsm8k", "--source", str(source), "--out", str(out), "--held_out", "5"]) == 0
    check_readable(out)
    trained, tested = ({row["prompt"] for row in read(out / f"{name}.jsonl")} for name in ("prompts", "test"))
    assert (len(trained), len(tested), len(trained & tested)) == (25, 5, 0)
    for row in read(out / "sft.jsonl"):
        assert re.fullmatch(r"(\d+) \+ 1000 = (\d+) apples\n#### 1,\d{3}", row["response"])
    assert all(re.search(r"#### 1,\d{3}$", row["answer"]) for row in read(out / "test.jsonl"))


def test_gsm8k_preferences_differ_in_the_result_only(tmp_path: Path) -> None:
    prepare("gsm8k", write(tmp_path / "f.jsonl", gsm8k(30)), tmp_path / "out", held_out=5, seed=0)
    for row in read(tmp_path / "out" / "preferences.jsonl"):
        chosen, _, right = row["chosen"].rpartition("#### ")
        rejected, _, wrong = row["rejected"].rpartition("#### ")
        assert chosen == rejected
        assert int(right.replace(",", "")) != int(wrong)


def test_hh_files_split_the_dialogue_at_its_last_answer(tmp_path: Path) -> None:
    prepare("hh", write(tmp_path / "f.jsonl", hh(10)), tmp_path / "out", held_out=2, seed=0)
    check_readable(tmp_path / "out")
    row = read(tmp_path / "out" / "preferences.jsonl")[0]
    assert row["prompt"].startswith("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: ")
    assert row["prompt"].endswith("?\n\nAssistant:")
    assert (row["chosen"], row["rejected"]) == (" yes", " no")


def test_hh_pairs_with_an_empty_answer_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = hh(10)
    rows[3]["rejected"] = rows[3]["rejected"].removesuffix("no")
    prepare("hh", write(tmp_path / "f.jsonl", rows), tmp_path / "out", held_out=2, seed=0)
    written = sum(len(read(tmp_path / "out" / f"{name}.jsonl")) for name in ("preferences", "test_preferences"))
    assert written == 9
    assert "left out 1 of" in caplog.text


def test_hh_pairs_whose_answers_follow_different_prompts_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = hh(10)
    rows[3]["rejected"] = rows[4]["rejected"]
    prepare("hh", write(tmp_path / "f.jsonl", rows), tmp_path / "out", held_out=2, seed=0)
    pairs = [row for name in ("preferences", "test_preferences") for row in read(tmp_path / "out" / f"{name}.jsonl")]
    assert len(pairs) == 9
    assert not any("3?" in row["prompt"] for row in pairs)
    assert "records, whose answers follow different prompts" in caplog.text


def test_compressed_source_gives_the_same_files_and_the_seed_decides_what_is_held_out(tmp_path: Path) -> None:
    source = write(tmp_path / "f.jsonl", gsm8k(30))
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress(source.read_bytes()))
    for name, path, seed in (("a", source, 0), ("b", tmp_path / "f.jsonl.gz", 0), ("c", source, 1)):
        prepare("gsm8k", path, tmp_path / name, held_out=5, seed=seed)
    a, b, c = ((tmp_path / name / "test.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_additions_need_no_source_and_hold_out_as_many_as_asked(tmp_path: Path) -> None:
    assert main(["data", "prepare", "additions", "--out", str(tmp_path / "out"), "--held_out", "20"]) == 0
    check_readable(tmp_path / "out", "ratings")
    assert all(len(record.responses) == 4 for record in read_ranked(tmp_path / "out" / "ratings.jsonl"))
    assert len(read(tmp_path / "out" / "test.jsonl")) == 20


@pytest.mark.parametrize(
    ("dataset", "row", "complaint"),
    [
        ("gsm8k", {"question": "q", "answer": "no number"}, "expected 'question' and an 'answer' that ends in"),
        ("gsm8k", {"chosen": "a", "rejected": "b"}, "not a GSM8K record"),
        ("hh", {"chosen": "a", "rejected": "b"}, "not an HH record"),
        ("hh", {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "b"}, "not an HH record"),
    ],
)
def test_record_of_another_data_set_is_refused_and_nothing_is_written(
    tmp_path: Path, dataset: str, row: dict[str, str], complaint: str
) -> None:
    rows = {"gsm8k": gsm8k, "hh": hh}[dataset](9)
    source = write(tmp_path / "f.jsonl", random.Random(0).sample([*rows, row], 10))
    with pytest.raises(DataError, match=complaint):
        prepare(dataset, source, tmp_path / "out", held_out=2, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["f.jsonl"]


@pytest.mark.parametrize("held_out", [0, 10])
def test_too_few_records_to_hold_some_out_are_refused(tmp_path: Path, held_out: int) -> None:
    with pytest.raises(DataError, match=f"has 10 records; held_out must lie between 1 and one less, got {held_out}"):
        prepare("hh", write(tmp_path / "f.jsonl", hh(10)), tmp_path / "out", held_out=held_out, seed=0)


def test_bad_sources_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "out")]
    assert main(["data", "prepare", "hh", "--source", str(tmp_path / "nowhere"), *out]) == 2
    assert "nowhere' does not exist" in capsys.readouterr().err
    assert main(["data", "prepare", "hh", *out]) == 2
    assert "hh is prepared from its original file; give --source FILE" in capsys.readouterr().err
    for line in (b"{", b'{"chosen": 1}', b"\xff", rb'{"chosen": "\udc00"}'):
        (tmp_path / "f.jsonl").write_bytes(b"\n" + line)
        assert main(["data", "prepare", "hh", "--source", str(tmp_path / "f.jsonl"), *out]) == 2
        assert "f.jsonl, line 2: " in capsys.readouterr().err


def test_directory_of_the_user_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(DataError, match="exists already"):
        prepare("hh", write(tmp_path / "f.jsonl", hh(10)), tmp_path, held_out=2, seed=0)
    assert (tmp_path / "mine").exists()
