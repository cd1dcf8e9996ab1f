"""The grader against hand-labelled cases; gold values are written beside each."""

from fractions import Fraction

import pytest

from align_core.conformance.reward import check_reward
from align_core.errors import DataError
from align_eval.accuracy.math import MathReward, extract, grade, parse_gold, parse_number
from align_eval.accuracy.verdict import Verdict

HASH = [
    ("She has 48+24 = 72.\n#### 72", "72"),
    ("#### 72.", "72"),
    ("####72", "72"),
    ("####   72", "72"),
    ("#### 72.00", "72"),
    ("#### $18", "18"),
    ("#### -5", "-5"),
    ("#### -$5", "-5"),
    ("#### $-5", "-5"),
    ("#### \u22125", "-5"),
    ("#### - 5", "-5"),
    ("#### 3 - 8 = - 5", "-5"),
    ("#### 1,000", "1000"),
    ("#### $1,234,567.50", "1234567.5"),
    ("#### 50%", "50"),
    ("#### 18 dollars", "18"),
    ("#### 18km", "18"),
    ("#### **18**", "18"),
    ("#### 5 + 3 = 8", "8"),
    ("#### 0.72", "0.72"),
    ("#### .5", "0.5"),
    ("#### 1/2", "1/2"),
    ("#### 3\n#### 4", "4"),
    ("#### 72\n" + "and that is all there is to say. " * 20, "72"),
    ("#### 1. First\nAdd them.\n#### 2) Then\nsum\n#### 9", "9"),
    ("#### 18, because 6 * 3 = 18", "18"),
]


@pytest.mark.parametrize(("text", "value"), HASH)
def test_hash_answers_are_read_in_strict_and_flexible_grading(text: str, value: str) -> None:
    for strict in (True, False):
        found = extract(text, strict=strict)
        assert (found.number, found.method) == (Fraction(value), "hash")


FLEXIBLE = [
    (r"so \boxed{72}", "72", "boxed"),
    (r"first \boxed{3}, finally \boxed{4}", "4", "boxed"),
    (r"\boxed{\$1,000}", "1000", "boxed"),
    (r"\boxed{1{,}000}", "1000", "boxed"),
    (r"\boxed{72\text{ clips}}", "72", "boxed"),
    (r"\boxed{\frac{3}{4}}", "3/4", "boxed"),
    (r"\boxed{x = 5}", "5", "boxed"),
    (r"\boxed{- 5}", "-5", "boxed"),
    (r"\boxed{-\frac{1}{2}}", "-1/2", "boxed"),
    (r"\boxed{60 \text{ km/h}}", "60", "boxed"),
    (r"\boxed{90^\circ}", "90", "boxed"),
    ("The answer is - 5.", "-5", "answer is"),
    (r"\boxed{50\%}", "50", "boxed"),
    (r"\boxed{7", "7", "boxed"),
    ("The answer is 18.", "18", "answer is"),
    ("The answer is $18.50. Not 3.", "18.5", "answer is"),
    ("**Answer:** 18", "18", "answer is"),
    ("Final Answer: 1,000 dollars", "1000", "answer is"),
    ("The answer is: 18", "18", "answer is"),
    ("The answer is 3 * 6 = 18.", "18", "answer is"),
    ("The answer is 18 dollars per day for 5 days.", "18", "answer is"),
    ("The answer is therefore 18 apples", "18", "answer is"),
    ("The answer is clear: add 3 and 4 to get 7", "7", "last number"),
    ("6 and 7 make 13", "13", "last number"),
    ("10-3", "3", "last number"),
    ("it is -3", "-3", "last number"),
    ("it costs 1,000.", "1000", "last number"),
    ("#### Step 3: add\nso we get 12", "12", "last number"),
    ("#### 1. First\nadd 3 and 4: 7", "7", "last number"),
]


@pytest.mark.parametrize(("text", "value", "method"), FLEXIBLE)
def test_flexible_grading_reads_other_marks_in_order(text: str, value: str, method: str) -> None:
    found = extract(text)
    assert (found.number, found.method) == (Fraction(value), method)
    assert extract(text, strict=True).number is None


def test_marks_win_in_the_documented_order() -> None:
    assert extract(r"answer is 3, \boxed{4}, #### 5").number == 5
    assert extract(r"answer is 3, \boxed{4}, then 9").number == 4
    assert extract("answer is 3. Check with 9").number == 3


AMBIGUOUS = [
    "#### 10^3",
    "#### 3, 5",
    "#### 1:30",
    "#### 5 + 3",
    "#### 5-6",
    "#### 3 or 4",
    "#### 3 x 4",
    "#### 2.5.3",
    "#### 1,00",
    "#### 1 1/2",
    "#### 1/0",
    "#### 5e3",
    r"\boxed{10^3}",
    r"\boxed{3, 5}",
    r"\boxed{\sqrt{16}}",
    r"\boxed{5\pi}",
    r"\boxed{[3,\infty)}",
    r"\boxed{7x}",
    r"\boxed{x >= 5}",
    r"\boxed{a - 5}",
    r"\boxed{3!}",
    r"\boxed{2\frac{1}{2}}",
    "The answer is 5-6.",
]


@pytest.mark.parametrize("text", AMBIGUOUS)
def test_marked_answer_that_names_no_single_number_is_none_of_its_parts(text: str) -> None:
    found = extract(text)
    assert found.number is None
    assert found.text  # the trace shows what was refused
    assert found.method != "last number"


@pytest.mark.parametrize("text", ["", "no idea", "####", "#### none", "H2O", r"\boxed{}", "answer is unknown"])
def test_text_without_a_number_has_no_answer(text: str) -> None:
    assert extract(text) == (None, "", "none")


def test_72_is_neither_7200_nor_hundredths() -> None:
    assert len({parse_number(text) for text in ("72", "7200", "7,200", "0.72", ".72", "$72", "72%", "72.0")}) == 3
    for completion in ("#### 7200", "#### 72,00", "#### 0.72", "#### 7.2", "#### -72", "#### 172", "#### 72^2"):
        assert grade(completion, Fraction(72))[:2] == (False, False)


def test_equality_is_exact() -> None:
    assert grade("#### 0.3333", Fraction(1, 3)).flexible is False
    assert grade("#### 0.1", Fraction(1, 10)).flexible is True
    assert grade("#### " + "9" * 40, Fraction(10**40 - 1)).flexible is True
    assert grade("#### " + "9" * 40, Fraction(10**40)).flexible is False


def test_grade_traces_what_was_read_and_where() -> None:
    """Strict grading wants the mark; both verdicts come from one reading, which is kept."""
    assert grade("6 * 12 = 72\n#### 72", Fraction(72)) == Verdict(True, True, "72", "hash")
    assert grade("#### 71", Fraction(72)) == Verdict(False, False, "71", "hash")
    assert grade("The answer is 72.", Fraction(72)) == Verdict(False, True, "72", "answer is")
    assert grade("no idea", Fraction(72)) == Verdict(False, False, "", "none")


@pytest.mark.parametrize(("text", "value", "method"), [*((t, v, "hash") for t, v in HASH), *FLEXIBLE])
def test_strict_verdict_equals_grading_by_the_mark_alone(text: str, value: str, method: str) -> None:
    assert grade(text, Fraction(value)).strict == (extract(text, strict=True).number == Fraction(value))


def test_absurdly_long_digits_are_no_number() -> None:
    assert extract("#### " + "9" * 10_000).number is None
    assert extract("1/" + "9" * 10_000).number is None


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("72", "72"),
        (" 1,000 ", "1000"),
        (72, "72"),
        (0.5, "0.5"),
        ("$18.00", "18"),
        ("Natalia sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("Step 1\n#### 1,234", "1234"),
        ("18 dollars", "18"),
    ],
)
def test_gold_is_a_number_or_a_solution(answer: object, value: str) -> None:
    assert parse_gold(answer) == Fraction(value)


BAD_GOLD = ["", "many", "3 or 4", "first 3 then 4", "#### many", None, True, ["72"], float("nan"), float("inf")]


@pytest.mark.parametrize("answer", BAD_GOLD)
def test_unusable_gold_is_not_guessed(answer: object) -> None:
    assert parse_gold(answer) is None


def test_reward_scores_each_completion_and_explains_missing_gold() -> None:
    """Golds 72, none, 'x', 5 against the same completion `#### 72`: right, two unusable records, wrong."""
    scores = MathReward()(["q"] * 4, ["#### 72"] * 4, {"answer": ["72", None, "x", 5], "id": [1, 2, 3, 4]})
    assert [score.value for score in scores] == [1.0, None, None, 0.0]
    assert [score.extracted for score in scores] == ["72", "", "", "72"]
    assert "'x' names no number" in scores[2].error


def test_reward_keeps_the_contract() -> None:
    columns = {"answer": ["72", "x", 5, "#### 9"], "id": [1, 2, 3, 4]}
    check_reward(MathReward(), prompts=["q"] * 4, completions=["#### 72", "72", "no idea", "9"], columns=columns)


def test_reward_scores_text_without_answer_as_wrong_not_as_failed() -> None:
    (score,) = MathReward()(["q"], ["no idea"], {"answer": ["72"]})
    assert (score.value, score.error, score.extracted) == (0.0, "", "")


def test_reward_refuses_data_without_the_column() -> None:
    with pytest.raises(DataError, match="needs the column 'answer'; the data has 'id' or 'text'"):
        MathReward()(["q"], ["#### 1"], {"text": ["a"], "id": [1]})


def test_reward_refuses_lists_of_different_length() -> None:
    with pytest.raises(DataError, match="1 prompts, 2 completions and 1 answers"):
        MathReward()(["q"], ["1", "2"], {"answer": ["1"]})
