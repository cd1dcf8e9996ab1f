"""FastChat's files: answers and judgments as its llm_judge writes them, so that either side reads the other's.

    model_answer/MODEL.jsonl          question_id, answer_id, model_id, choices [{index, turns}], tstamp
    model_judgment/JUDGE_single.jsonl question_id, model, judge [name, prompt], user_prompt, judgment, score, turn,
                                      tstamp
    model_judgment/JUDGE_pair.jsonl   question_id, model_1, model_2, g1_winner, g2_winner, judge, g1_user_prompt,
                                      g1_judgment, g2_user_prompt, g2_judgment, turn, tstamp

A score of -1 and the winner `error` stand for a judgment without a verdict. Knows nothing of judges or statistics.
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_core.errors import DataError
from align_eval.json_lines import read_rows
from align_eval.results import write_json_lines

ERROR_TEXT = "$ERROR$"  # what FastChat stores as an answer when a request failed
NO_SCORE = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One model's turns to one question."""

    question_id: int
    model: str
    turns: tuple[str, ...]
    tstamp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SingleRow:
    """A line of JUDGE_single.jsonl."""

    question_id: int
    model: str
    judge: tuple[str, str]
    """The judge's name and the prompt's."""
    user_prompt: str
    judgment: str
    score: float
    """-1 where there is no verdict."""
    turn: int
    tstamp: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """A line of JUDGE_pair.jsonl: two games, the second with the answers swapped."""

    question_id: int
    model_1: str
    model_2: str
    g1_winner: str
    """`model_1`, `model_2`, `tie` or `error`."""
    g2_winner: str
    judge: tuple[str, str]
    g1_user_prompt: str
    g1_judgment: str
    g2_user_prompt: str
    g2_judgment: str
    turn: int
    tstamp: float


def write_answers(path: Path, answers: Iterable[Answer]) -> None:
    """Replaces `path` by the answers in the order of their questions, atomically.

    The answer's id is made of its content, where FastChat draws it at random: equal answers make equal files.
    """
    ordered = sorted(answers, key=lambda answer: answer.question_id)
    write_json_lines(path, (_answer_row(answer) for answer in ordered))


def _answer_row(answer: Answer) -> Mapping[str, object]:
    digest = hashlib.sha256(json.dumps([answer.question_id, answer.model, answer.turns]).encode()).digest()
    return {
        "question_id": answer.question_id,
        "answer_id": base64.b32encode(digest)[:22].decode(),
        "model_id": answer.model,
        "choices": [{"index": 0, "turns": list(answer.turns)}],
        "tstamp": answer.tstamp,
    }


def read_answers(path: Path) -> dict[int, Answer]:
    """The answers by question; of a question that occurs twice the last, as FastChat's own tidying does.

    The model's name is the file's, as in FastChat. Only the first choice is taken, the one that is judged.

    Raises:
        DataError: a line is no answer, or an answer is the error text that FastChat stores for failed requests.
    """
    answers: dict[int, Answer] = {}
    for _, where, row in read_rows(path):
        try:
            turns = tuple(str(turn) for turn in row["choices"][0]["turns"])
            answer = Answer(
                question_id=int(row["question_id"]),
                model=path.stem,
                turns=turns,
                tstamp=float(row.get("tstamp", 0.0)),
            )
        except (TypeError, ValueError, LookupError) as error:
            raise DataError(f"{where}: not an answer in FastChat's format ({type(error).__name__}: {error})") from error
        if ERROR_TEXT in turns:
            raise DataError(
                f"{where}: the answer is {ERROR_TEXT}, a failed request stored as an answer; answer it again"
            )
        answers[answer.question_id] = answer
    return answers


def write_single(path: Path, rows: Iterable[SingleRow]) -> None:
    """Replaces `path` by judgments in the order of model, question and turn, atomically."""
    ordered = sorted(rows, key=lambda row: (row.model, row.question_id, row.turn))
    write_json_lines(
        path,
        (
            {
                "question_id": row.question_id,
                "model": row.model,
                "judge": list(row.judge),
                "user_prompt": row.user_prompt,
                "judgment": row.judgment,
                "score": int(row.score) if row.score.is_integer() else row.score,  # as FastChat has it
                "turn": row.turn,
                "tstamp": row.tstamp,
            }
            for row in ordered
        ),
    )


def read_single(paths: Sequence[Path]) -> list[SingleRow]:
    """All judgments of the files in their order, repeated ones too; raises DataError for a line that is none."""
    rows: list[SingleRow] = []
    for path in paths:
        for _, where, row in read_rows(path):
            try:
                rows.append(
                    SingleRow(
                        question_id=int(row["question_id"]),
                        model=str(row["model"]),
                        judge=_judge(row),
                        user_prompt=str(row.get("user_prompt", "")),
                        judgment=str(row["judgment"]),
                        score=float(row["score"]),
                        turn=int(row["turn"]),
                        tstamp=float(row.get("tstamp", 0.0)),
                    )
                )
            except (TypeError, ValueError, LookupError) as error:
                raise DataError(f"{where}: not a single judgment of FastChat's ({_brief(error)})") from error
    return rows


def write_pairs(path: Path, rows: Iterable[PairRow]) -> None:
    """Replaces `path` by pairwise judgments in the order of models, question and turn, atomically."""
    ordered = sorted(rows, key=lambda row: (row.model_1, row.model_2, row.question_id, row.turn))
    names = PairRow.__dataclass_fields__
    write_json_lines(
        path,
        ({name: list(row.judge) if name == "judge" else getattr(row, name) for name in names} for row in ordered),
    )


def read_pairs(paths: Sequence[Path]) -> list[PairRow]:
    """All pairwise judgments of the files in their order; raises DataError for a line that is none."""
    rows: list[PairRow] = []
    for path in paths:
        for _, where, row in read_rows(path):
            try:
                rows.append(
                    PairRow(
                        question_id=int(row["question_id"]),
                        judge=_judge(row),
                        turn=int(row["turn"]),
                        tstamp=float(row.get("tstamp", 0.0)),
                        **{name: str(row[name]) for name in ("model_1", "model_2", "g1_winner", "g2_winner")},
                        **{
                            f"{game}_{name}": str(row.get(f"{game}_{name}", ""))
                            for game in ("g1", "g2")
                            for name in ("user_prompt", "judgment")
                        },
                    )
                )
            except (TypeError, ValueError, LookupError) as error:
                raise DataError(f"{where}: not a pairwise judgment of FastChat's ({_brief(error)})") from error
    return rows


def _judge(row: Mapping[str, Any]) -> tuple[str, str]:
    name, prompt = row["judge"]
    return str(name), str(prompt)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
