"""A benchmark of our own words in MT-Bench's form: 8 categories of 10 questions, two turns each, with judge prompts."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from align_eval.mt_bench.fastchat import Answer, write_answers
from align_eval.mt_bench.folder import Folder
from align_eval.mt_bench.questions import CATEGORIES, Bench, load_bench

_SINGLE = "Rate this.\nQuestion: {question}\n{reference}Answer: {answer}\nGive [[rating]]."
_SINGLE_2 = "1: {question_1}\n{answer_1}\n2: {question_2}\n{reference}{answer_2}"
_PAIR = "Question: {question}\n{reference}A: {answer_a}\nB: {answer_b}"
_PAIR_2 = (
    "1: {question_1}\nA: {answer_a_1}\nB: {answer_b_1}\n2: {question_2}\n{reference}A: {answer_a_2}\nB: {answer_b_2}"
)


def _prompts() -> list[Mapping[str, str]]:
    rows = []
    for name, first, second in (("single-v1", _SINGLE, _SINGLE_2), ("pair-v2", _PAIR, _PAIR_2)):
        math = f"{name.partition('-')[0]}-math-v1"
        rows += [
            (name, first.replace("{reference}", "")),
            (f"{name}-multi-turn", second.replace("{reference}", "")),
            (math, first.replace("{reference}", "Right: {ref_answer_1}\n")),
            (f"{math}-multi-turn", second.replace("{reference}", "Right: {ref_answer_1}, {ref_answer_2}\n")),
        ]
    return [{"name": n, "system_prompt": f"You judge ({n}).", "prompt_template": t} for n, t in rows]


def _lines(path: Path, rows: list[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the data, laid out as FastChat's."""
    root = tmp_path_factory.mktemp("data")
    rows: list[Mapping[str, object]] = []
    references: list[Mapping[str, object]] = []
    for index in range(80):
        number, category = 81 + index, CATEGORIES[index // 10]
        rows.append(
            {"question_id": number, "category": category, "turns": [f"First {number}?", f"Then {number} {{x}}?"]}
        )
        if category in ("reasoning", "math", "coding"):
            turns = [f"right {number}", f"also right {number}"]
            references.append({"question_id": number, "choices": [{"index": 0, "turns": turns}]})
    _lines(root / "mt_bench" / "question.jsonl", rows)
    _lines(root / "mt_bench" / "reference_answer" / "gpt-4.jsonl", references)
    _lines(root / "judge_prompts.jsonl", [dict(row) for row in _prompts()])
    return root


@pytest.fixture(scope="session")
def bench(data: Path) -> Bench:
    """The same, read."""
    return load_bench(data)


@pytest.fixture(scope="session")
def write_into(bench: Bench) -> Callable[..., Folder]:
    """Writes a model's answers into the folder of a run: what it says, about which question and turn."""

    def write(root: Path, model: str, *, says: str = "I say") -> Folder:
        run = Folder(root)
        answers = [
            Answer(question_id=q.id, model=model, turns=tuple(f"{says} {t} on {q.id}" for t in (1, 2)), tstamp=1.0)
            for q in bench.questions
        ]
        write_answers(run.answers(model), answers)
        return run

    return write


@pytest.fixture
def write_model(tmp_path: Path, write_into: Callable[..., Folder]) -> Callable[..., Folder]:
    """The same, into a folder of this test."""

    def write(model: str, *, says: str = "I say", folder: str = "run") -> Folder:
        return write_into(tmp_path / folder, model, says=says)

    return write
