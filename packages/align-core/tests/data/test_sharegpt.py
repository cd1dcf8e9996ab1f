"""ShareGPT conversations and pairs become records that the stages read."""

import json
from pathlib import Path

import pytest

from align_core.cli import main
from align_core.data.records import read_preferences, read_prompts, read_sft
from align_core.data.sharegpt import read_sharegpt, sharegpt_files
from align_core.errors import DataError


def turn(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def talk(n: int) -> dict[str, object]:
    return {"id": f"{n}", "conversations": [turn("human", f"{n}?"), turn("gpt", f"{n}!"), turn("human", "thanks")]}


def pair(n: int) -> dict[str, object]:
    turns = [turn("system", "Be brief."), turn("human", f"{n}?")]
    return {"conversations": turns, "chosen": turn("gpt", "yes"), "rejected": turn("gpt", "well")}


@pytest.mark.parametrize("as_lines", [False, True])
def test_conversations_end_in_an_answer(tmp_path: Path, as_lines: bool) -> None:
    source, rows = tmp_path / "f.json", [talk(n) for n in range(10)]
    source.write_text("\n".join(map(json.dumps, rows)) if as_lines else json.dumps(rows, indent=1), encoding="utf-8")
    out = tmp_path / "out"
    assert main(["data", "prepare", "sharegpt", "--source", str(source), "--out", str(out), "--held_out", "2"]) == 0
    assert {path.stem for path in out.iterdir()} == {"sft", "test_sft", "prompts", "test"}
    trained, tested = read_sft(out / "sft.jsonl"), read_sft(out / "test_sft.jsonl")
    assert (len(trained), len(tested)) == (8, 2)
    for record in [*trained, *tested]:
        (asked,) = record.prompt
        assert isinstance(asked, dict)
        assert record.response == asked["content"].replace("?", "!")
    assert [turn["role"] for turn in read_prompts(out / "prompts.jsonl")[0].prompt] == ["user", "assistant", "user"]


def test_pairs_keep_the_turns_before(tmp_path: Path) -> None:
    files = sharegpt_files([pair(n) for n in range(3)], [pair(3)])
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in files["preferences"]), encoding="utf-8")
    record = read_preferences(path)[1]
    assert [turn["content"] for turn in record.prompt] == ["Be brief.", "1?"]  # type: ignore[index]
    assert (record.chosen, record.rejected) == ("yes", "well")
    assert len(files["test_preferences"]) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], "conversation 0: no list 'conversations'"),
        ([talk(0), {"conversations": [turn("human", "x")]}], "conversation 1: no turn of the assistant"),
        ([{"conversations": [turn("bot", "x")]}], "a turn must be .* got {'from': 'bot'"),
    ],
)
def test_other_forms_are_told_by_number(tmp_path: Path, rows: list[object], message: str) -> None:
    (tmp_path / "f.json").write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_sharegpt(tmp_path / "f.json")


def test_line_ends_inside_of_texts_end_no_line(tmp_path: Path) -> None:
    """U+2028, U+0085 and the like may stand in JSON as they are."""
    said = "one\u2028two\u0085three"
    row = {"conversations": [turn("human", said), turn("gpt", "yes")]}
    lines = [json.dumps(row, ensure_ascii=False)] * 2
    (tmp_path / "f.jsonl").write_bytes("\n\n".join(lines).encode("utf-8") + b"\r\n")
    assert read_sharegpt(tmp_path / "f.jsonl") == [row, row]


@pytest.mark.parametrize("bad", [b"{", b"\xff", rb'{"conversations": "\ud800"}'])
def test_bad_line_is_told_by_number(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "f.jsonl").write_bytes(json.dumps(talk(0)).encode() + b"\n" + bad)
    with pytest.raises(DataError, match=r"f.jsonl, line 2: .*; expected a JSON array or JSON lines"):
        read_sharegpt(tmp_path / "f.jsonl")
