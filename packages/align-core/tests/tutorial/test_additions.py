"""The additions: right and careless answers by hand, and a split that keeps held-out questions unseen."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from align_core.errors import DataError
from align_core.tutorial.additions import (
    Addition,
    additions_files,
    demonstrations,
    mistake,
    preference_pairs,
    rated_answers,
    split,
    ten_off,
    write_additions,
)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def number_pair(record: dict[str, str]) -> tuple[int, int]:
    a, b = map(int, re.findall(r"\d+", record["prompt"]))
    return min(a, b), max(a, b)


@pytest.mark.parametrize(
    ("a", "b", "right", "careless"),
    [(27, 58, 85, 75), (21, 58, 79, 79), (15, 15, 30, 20), (45, 54, 99, 99), (10, 80, 90, 90)],
)
def test_careless_answer_drops_the_carry_of_the_units(a: int, b: int, right: int, careless: int) -> None:
    addition = Addition(a=a, b=b)
    assert (addition.answer, addition.careless) == (right, careless)
    assert addition.question == f"What is {a} + {b}?"


def test_split_holds_every_addition_once_and_keeps_twins_together() -> None:
    """80 sums from 20 to 99; sum s has s - 19 ordered pairs: 80 * 81 / 2 = 3,240. The 40 even sums hold a pair of
    equals: (3,240 + 40) / 2 = 1,640 unordered pairs, 164 of them held out.
    """
    train, held_out = split(seed=3, held_out=0.1)
    pairs = [{(min(q.a, q.b), max(q.a, q.b)) for q in side} for side in (train, held_out)]
    assert len({(q.a, q.b) for q in train + held_out}) == len(train) + len(held_out) == 3240
    assert not pairs[0] & pairs[1]
    assert (len(pairs[0]), len(pairs[1])) == (1476, 164)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1])
def test_split_refuses_a_share_that_leaves_one_side_empty(share: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(seed=0, held_out=share)


def test_student_carries_as_often_as_asked_and_errs_nowhere_else() -> None:
    """4,000 draws at 0.4: four standard deviations are 4 * sqrt(0.24 / 4000) = 0.031."""
    carry, plain = Addition(a=27, b=58), Addition(a=21, b=58)
    responses = [r["response"] for r in demonstrations([carry] * 4000, correct=0.4, rng=random.Random(0))]
    assert set(responses) == {" 85", " 75"}
    assert abs(responses.count(" 85") / 4000 - 0.4) < 0.031
    assert {r["response"] for r in demonstrations([plain] * 100, correct=0.4, rng=random.Random(0))} == {" 79"}


def test_mistakes_are_ten_off_near_or_anything_as_often_as_documented() -> None:
    """Answer 85, which carries: how often is it 75?

    "Ten off", 0.4 of all, always. "Near", 0.24: seven distances up and down are 14 draws, of which +20 has three digits
    and is drawn again, and -10 is there twice: 2/13. "Any", 0.36: one of 90 numbers but 85 itself: 1/89.
    0.4 + 0.24 * 2/13 + 0.36 / 89 = 0.441; four standard deviations: 4 * sqrt(0.441 * 0.559 / 4000) = 0.031.
    """
    rng = random.Random(0)
    mistakes = [mistake(Addition(a=27, b=58), rng=rng) for _ in range(4000)]
    assert abs(mistakes.count(75) / 4000 - 0.441) < 0.031
    assert set(mistakes) == set(range(10, 100)) - {85}


@pytest.mark.parametrize(("a", "b", "wrong"), [(27, 58, 75), (21, 58, 89), (45, 54, 89), (45, 44, 99), (10, 10, 30)])
def test_ten_off_mistakes_the_carry_within_two_digits(a: int, b: int, wrong: int) -> None:
    assert ten_off(Addition(a=a, b=b)) == wrong


def test_ratings_score_four_different_answers_by_their_distance() -> None:
    records = list(rated_answers([Addition(a=27, b=58)] * 50, rng=random.Random(0)))
    for record in records:
        answers = [int(text) for text in record["response"]]
        assert answers[:2] == [85, 75]
        assert len(set(answers)) == 4
        assert record["score"] == [-abs(answer - 85) for answer in answers]
    assert len({tuple(record["response"]) for record in records}) > 25


def test_preference_pairs_put_the_right_answer_first() -> None:
    pairs = list(preference_pairs([Addition(a=27, b=58)] * 50, rng=random.Random(0)))
    assert {r["chosen"] for r in pairs} == {" 85"}
    assert " 85" not in {r["rejected"] for r in pairs}
    assert {r["prompt"] for r in pairs} == {"What is 27 + 58?"}


def test_files_hold_the_documented_records_and_keep_the_test_unseen(tmp_path: Path) -> None:
    files = write_additions(tmp_path / "data", seed=1)
    assert files == additions_files(tmp_path / "data")
    test, test_pairs = read(files.test), read(files.test_preferences)
    trained = [*read(files.sft), *read(files.preferences), *read(files.ratings), *read(files.prompts)]
    assert read(files.sft)[0].keys() == {"prompt", "response"}
    assert read(files.preferences)[0].keys() == {"prompt", "chosen", "rejected"}
    assert read(files.ratings)[0].keys() == {"prompt", "response", "score"}
    assert read(files.prompts)[0].keys() == test[0].keys() == {"prompt", "answer"}
    assert not {number_pair(r) for r in trained} & {number_pair(r) for r in test + test_pairs}
    assert all(int(r["answer"]) == sum(number_pair(r)) for r in test + read(files.prompts))
    assert len(test) == len({r["prompt"] for r in test}) == 200


def test_every_second_test_question_needs_a_carry(tmp_path: Path) -> None:
    test = read(write_additions(tmp_path / "data", seed=1).test)
    carries = [Addition(a=a, b=b).carries for a, b in map(number_pair, test)]
    assert carries == [True, False] * 100


def test_same_seed_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    first, again, other = (write_additions(tmp_path / name, seed=seed) for name, seed in [("a", 5), ("b", 5), ("c", 6)])
    for one, two in [(first.sft, again.sft), (first.preferences, again.preferences), (first.ratings, again.ratings)]:
        assert one.read_bytes() == two.read_bytes()
    assert first.test.read_bytes() != other.test.read_bytes()


def test_too_many_test_questions_are_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="lower num_test or raise held_out"):
        write_additions(tmp_path / "data", seed=0, held_out=0.01)
    assert list(tmp_path.iterdir()) == []
