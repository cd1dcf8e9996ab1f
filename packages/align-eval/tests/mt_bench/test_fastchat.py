"""FastChat's files: ours load there (the same keys and types), theirs load here, and its aggregation is reproduced.

The fixtures hold what published files hold: -1 and $ERROR$, empty judgments, judgments appended twice by two runs.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from align_core.errors import DataError
from align_eval.cli import main
from align_eval.mt_bench.fastchat import Answer, read_answers, read_pairs, read_single, write_answers, write_single
from align_eval.mt_bench.outcomes import strict_matches, strict_ratings
from align_eval.mt_bench.pairs import fastchat_win_rates, order_effect, win_rates
from align_eval.mt_bench.questions import Bench
from align_eval.mt_bench.single import fastchat_means, model_scores
from align_eval.mt_bench.verdicts import compatible_rating, compatible_winner

SINGLE_KEYS = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]


def _lines(path: Path, rows: list[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _single_row(question: int, turn: int, model: str, judgment: str) -> dict[str, Any]:
    score = compatible_rating(judgment)
    if score is not None and score.is_integer():
        score = int(score)
    values = (question, model, ["gpt-4", "single-v1"], "p", judgment, -1 if score is None else score, turn, 1.5)
    return dict(zip(SINGLE_KEYS, values))


@pytest.fixture
def singles(tmp_path: Path) -> Path:
    """Three models, 160 judgments each; of model b a run appended twice, of model c many that cannot be read."""
    draw = random.Random(0)
    good = ["Rating: [[{}]]", "[[{}]]", "Fine. Rating: [[{}.5]]"]
    odd = ["$ERROR$", "", "[[rating: 3]]", "[[10/10]]", "as in [1]. Rating: 8", "[[5]] then final [[9]]", "[[11]]"]
    rows = []
    for model, share, runs in (("a", 0.0, 1), ("b", 0.05, 2), ("c", 0.5, 1)):
        for _ in range(runs):
            for question in range(81, 161):
                for turn in (1, 2):
                    text = draw.choice(odd) if draw.random() < share else draw.choice(good).format(draw.randint(1, 9))
                    rows.append(_single_row(question, turn, model, text))
    return _lines(tmp_path / "gpt-4_single.jsonl", rows)


def _show_result_single(path: Path) -> dict[str, dict[str, float]]:
    """FastChat's show_result for single grading as its documentation describes it, written with pandas as it is there:
    rows of score -1 are dropped, then means by (model, turn) and by model."""
    frame = pd.read_json(path, lines=True)[["model", "score", "turn"]]
    frame = frame[frame["score"] != -1]
    by_turn = frame.groupby(["model", "turn"]).mean()
    average = frame[["model", "score"]].groupby("model").mean()
    return {
        model: {
            "turn 1": by_turn.loc[(model, 1), "score"],
            "turn 2": by_turn.loc[(model, 2), "score"],
            "average": average.loc[model, "score"],
        }
        for model in average.index
    }


def test_single_aggregation_equals_fastchats_exactly(singles: Path) -> None:
    assert fastchat_means(read_single([singles])) == _show_result_single(singles)


def test_single_aggregation_by_hand(tmp_path: Path) -> None:
    """m: turn 1 has 8 and 6 and (a repeated judgment) 6, mean 20/3; turn 2 has 5 and one -1, mean 5; all: 25/4."""
    texts = [(81, 1, "[[8]]"), (82, 1, "[[6]]"), (82, 1, "[[6]]"), (81, 2, "[[5]]"), (82, 2, "no")]
    path = _lines(tmp_path / "f.jsonl", [_single_row(q, t, "m", text) for q, t, text in texts])
    assert fastchat_means(read_single([path])) == {"m": {"turn 1": 20 / 3, "turn 2": 5.0, "average": 6.25}}


def test_strict_reading_differs_only_where_documented(singles: Path, bench: Bench) -> None:
    """Model a has one clean run: equal. b: of two runs the last counts. c: other texts count, and all are counted."""
    rows = read_single([singles])
    scores = {score.model: score for score in model_scores(bench, strict_ratings(rows))}
    means = fastchat_means(rows)
    assert scores["a"].micro.mean == pytest.approx(means["a"]["average"], abs=1e-12)
    assert {turn: cell.mean for turn, cell in scores["a"].turns.items()} == pytest.approx(
        {1: means["a"]["turn 1"], 2: means["a"]["turn 2"]}, abs=1e-12
    )
    assert scores["a"].failures == {}
    last_run = fastchat_means([row for row in rows if row.model == "b"][160:])
    unread = [row for row in rows if row.model == "b"][160:]
    if all(compatible_rating(row.judgment) is not None for row in unread):
        assert scores["b"].micro.mean == pytest.approx(last_run["b"]["average"], abs=1e-12)
    assert scores["b"].micro.expected == 160
    strict = {"[[rating: 3]]": 3, "[[10/10]]": 10, "[[5]] then final [[9]]": 9}
    expected = [
        strict.get(row.judgment, compatible_rating(row.judgment))
        for row in rows
        if row.model == "c" and row.judgment not in ("$ERROR$", "", "as in [1]. Rating: 8", "[[11]]")
    ]
    assert (scores["c"].micro.valid, scores["c"].failures) == (len(expected), {"no verdict": 160 - len(expected)})
    assert scores["c"].micro.mean == pytest.approx(sum(e for e in expected if e is not None) / len(expected))


def _game(judgment: str, swapped: bool) -> str:
    winner = compatible_winner(judgment)
    sides = {"A": "model_2" if swapped else "model_1", "B": "model_1" if swapped else "model_2", "tie": "tie"}
    return "error" if winner is None else sides[winner]


def _pair_row(question: int, turn: int, models: tuple[str, str], first: str, second: str) -> dict[str, Any]:
    return {
        "question_id": question,
        "model_1": models[0],
        "model_2": models[1],
        "g1_winner": _game(first, False),
        "g2_winner": _game(second, True),
        "judge": ["gpt-4", "pair-v2"],
        "g1_user_prompt": "p1",
        "g1_judgment": first,
        "g2_user_prompt": "p2",
        "g2_judgment": second,
        "turn": turn,
        "tstamp": 1.0,
    }


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    draw = random.Random(1)
    texts = ["[[A]]", "[[A]] good", "[[B]]", "[[C]]", "$ERROR$"]
    rows = [
        _pair_row(question, turn, models, draw.choice(texts), draw.choice(texts))
        for models in (("a", "b"), ("a", "c"), ("b", "c"))
        for question in range(81, 161)
        for turn in (1, 2)
    ]
    return _lines(tmp_path / "gpt-4_pair.jsonl", rows)


def _show_result_pairs(path: Path) -> pd.DataFrame:
    """FastChat's show_result for pairs as its documentation describes it: rows with an error are dropped; different
    winners or a tie are a tie for both; each row counts for both models."""
    frame = pd.read_json(path, lines=True)
    frame = frame[(frame["g1_winner"] != "error") & (frame["g2_winner"] != "error")]
    found = []
    for _, row in frame.iterrows():
        if row["g1_winner"] == "tie" or row["g1_winner"] != row["g2_winner"]:
            found += [{"model": row[m], "win": 0, "loss": 0, "tie": 1} for m in ("model_1", "model_2")]
        else:
            loser = "model_2" if row["g1_winner"] == "model_1" else "model_1"
            found.append({"model": row[row["g1_winner"]], "win": 1, "loss": 0, "tie": 0})
            found.append({"model": row[loser], "win": 0, "loss": 1, "tie": 0})
    table = pd.DataFrame(found).groupby("model").sum()
    total = table["win"] + table["loss"] + table["tie"]
    table["win_rate"], table["loss_rate"] = table["win"] / total, table["loss"] / total
    table["win_rate_adjusted"] = (table["win"] + 0.5 * table["tie"]) / total
    return table


def test_pair_aggregation_equals_fastchats_exactly(pairs: Path) -> None:
    table = _show_result_pairs(pairs)
    rates = fastchat_win_rates(read_pairs([pairs]))
    assert {rate.model for rate in rates} == set(table.index)
    for rate in rates:
        row = table.loc[rate.model]
        assert (rate.wins, rate.losses, rate.ties) == (row["win"], row["loss"], row["tie"])
        assert (rate.win_rate, rate.loss_rate, rate.win_rate_adjusted) == (
            row["win_rate"],
            row["loss_rate"],
            row["win_rate_adjusted"],
        )
    assert [rate.win_rate_adjusted for rate in rates] == sorted((r.win_rate_adjusted for r in rates), reverse=True)


def test_pair_aggregation_by_hand(tmp_path: Path, bench: Bench) -> None:
    """a beats b in both orders (1 win), the order decides once (a tie), one game has no verdict (not counted)."""
    games = [("[[A]]", "[[B]]"), ("[[A]]", "[[A]]"), ("[[A]]", "?")]
    path = _lines(tmp_path / "p.jsonl", [_pair_row(81 + i, 1, ("a", "b"), *texts) for i, texts in enumerate(games)])
    rows = read_pairs([path])
    first, second = fastchat_win_rates(rows)
    assert (first.model, first.wins, first.losses, first.ties, first.win_rate_adjusted) == ("a", 1, 0, 1, 0.75)
    assert (second.model, second.wins, second.losses, second.ties, second.win_rate_adjusted) == ("b", 0, 1, 1, 0.25)
    matches = strict_matches(rows)
    strict = win_rates(bench, matches)
    assert [(rate.model, rate.win_rate_adjusted) for rate in strict] == [("a", 0.75), ("b", 0.25)]
    order = order_effect(matches)
    assert (order.matches, order.inconsistent, order.failed) == (2, 1, 1)
    assert (order.first, order.second) == (3, 1)  # A was shown first in [[A]], [[A]], [[A]]; [[B]] is the second
    assert fastchat_win_rates(rows, baseline="c") == []


def test_command_prints_fastchats_tables(
    singles: Path, pairs: Path, tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--judgments", str(singles), "--judgments", str(pairs)]
    assert main(["mt-bench", "report", "--out", str(tmp_path), "--data", str(data), *files, "--compatible"]) == 0
    printed = capsys.readouterr().out
    for means in _show_result_single(singles).values():
        assert f"{means['average']:.6f}" in printed
    for value in _show_result_pairs(pairs)["win_rate_adjusted"]:
        assert f"{value:.6f}" in printed


def test_written_files_have_fastchats_keys_and_types(tmp_path: Path, singles: Path) -> None:
    answers = [Answer(question_id=q, model="m", turns=("one", "two \u00e9"), tstamp=2.5) for q in (82, 81)]
    write_answers(tmp_path / "m.jsonl", answers)
    first, second = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(first) == ["question_id", "answer_id", "model_id", "choices", "tstamp"]
    assert (first["question_id"], second["question_id"]) == (81, 82)
    assert first["choices"] == [{"index": 0, "turns": ["one", "two \u00e9"]}]
    assert len(first["answer_id"]) == 22
    assert first["answer_id"] != second["answer_id"]
    assert read_answers(tmp_path / "m.jsonl")[82] == answers[0]

    copy = tmp_path / "copy.jsonl"
    write_single(copy, read_single([singles]))
    rows = [json.loads(line) for line in copy.read_text(encoding="utf-8").splitlines()]
    assert list(rows[0]) == SINGLE_KEYS
    original = [json.loads(line) for line in singles.read_text(encoding="utf-8").splitlines()]
    key = lambda row: json.dumps(row, sort_keys=True)  # noqa: E731
    assert sorted(rows, key=key) == sorted(original, key=key)  # -1, 8 and 8.5 keep their types


def test_last_answer_of_a_question_counts(tmp_path: Path) -> None:
    row = {"question_id": 81, "answer_id": "x", "model_id": "m", "tstamp": 1.0}
    path = tmp_path / "named.jsonl"
    _lines(path, [{**row, "choices": [{"index": 0, "turns": [text, "b"]}]} for text in ("old", "new")])
    answer = read_answers(path)[81]
    assert (answer.turns[0], answer.model) == ("new", "named")


def test_bad_files_are_named(tmp_path: Path) -> None:
    row = {"question_id": 81, "choices": [{"turns": ["$ERROR$", "x"]}]}
    with pytest.raises(DataError, match=r"line 1: the answer is \$ERROR\$"):
        read_answers(_lines(tmp_path / "m.jsonl", [row]))
    with pytest.raises(DataError, match="line 1: not an answer"):
        read_answers(_lines(tmp_path / "m.jsonl", [{"question_id": 81}]))
    with pytest.raises(DataError, match="line 1: not a single judgment"):
        read_single([_lines(tmp_path / "j.jsonl", [{"question_id": 81, "model": "m"}])])
    with pytest.raises(DataError, match="line 1: not a pairwise judgment"):
        read_pairs([_lines(tmp_path / "j.jsonl", [{"question_id": 81, "model_1": "m"}])])
    with pytest.raises(DataError, match="does not exist"):
        read_single([tmp_path / "none.jsonl"])
