r"""Grading of MATH-style answers: what is read, what compares equal as text, and what math-verify adds."""

import pytest

from align_core.conformance.reward import check_reward
from align_core.errors import DataError
from align_eval.accuracy.equivalence import EquivalencePool
from align_eval.accuracy.latex import MathVerifyReward, equal, extract, gold_of, grade, last_boxed, normalise
from align_eval.accuracy.verdict import Verdict


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 7$", "7"),
        (r"\boxed{7", None),
        ("no box", None),
    ],
)
def test_last_box_is_read_to_its_own_brace(text: str, boxed: str | None) -> None:
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\tfrac{1}2", r"\frac{1}{2}"),
        (r"\left(3, \frac{\pi}{2}\right)", r"(3,\frac{\pi}{2})"),
        (r"5\text{ cm}", "5"),
        (r"5\text{ cm}^2", "5"),
        ("- 5", "-5"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"90^\circ", "90"),
        (r"50\%", "50"),
        ("x = 5", "5"),
        (r"\sqrt2", r"\sqrt{2}"),
        ("1{,}000", "1,000"),
        ("10,080.", "10080"),
        (".5", "0.5"),
        ("2.50", "2.5"),
        (r"\frac{3}{4}", "0.75"),
    ],
)
def test_spellings_of_one_answer_compare_equal(left: str, right: str) -> None:
    assert equal(left, right)
    assert equal(right, left)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("72", "7200"),
        ("72", "0.72"),
        (r"\frac{1}{2}", r"\frac{2}{1}"),
        ("x", "y"),
        ("(1,2)", "(2,1)"),
        ("-3", "3"),
        ("- 5", "5"),
        ("4", r"4\pi"),
        ("2", r"\sqrt{2}"),
        ("3", "3i"),
        ("3", "3!"),
        ("7", "7x-y"),
        (r"[3,\infty)", r"(3,\infty)"),
        ("y^2", "x^2"),
        ("x>3", "x<3"),
        ("x>=5", "5"),
        (r"5\text{ or }6", "56"),
        (r"5\text{ or 6}", "5"),
        (r"2\frac{1}{2}", r"\frac{21}{2}"),
    ],
)
def test_different_answers_compare_different(left: str, right: str) -> None:
    assert not equal(left, right)
    assert not equal(right, left)


def test_normalisation_is_idempotent() -> None:
    for text in (r"\dfrac12 \text{ cm}", r"\left[ 1, 2 \right)", "y=3x", r"\$1{,}000.50"):
        assert normalise(normalise(text)) == normalise(text)


def test_gold_is_the_boxed_part_or_a_short_answer() -> None:
    assert gold_of("We add.\n\nSo the answer is $\\boxed{\\frac{3}{4}}$.") == r"\frac{3}{4}"
    assert gold_of(r"\frac{3}{4}") == r"\frac{3}{4}"
    assert gold_of(7) == "7"
    for unusable in ("a solution\nwithout a box", "", None, True, ["7"]):
        assert gold_of(unusable) is None


def test_strict_wants_the_box_and_flexible_takes_the_phrase() -> None:
    completions = [r"$\boxed{\dfrac12}$", r"The answer is $\frac{1}{2}$. Done.", r"\boxed{2}", "one half"]
    assert grade(completions, [r"\frac{1}{2}"] * 4) == [
        Verdict(True, True, r"\dfrac12", "boxed"),
        Verdict(False, True, r"$\frac{1}{2}$", "answer is"),
        Verdict(False, False, "2", "boxed"),
        Verdict(False, False, "", "none"),
    ]
    assert extract(r"answer is 3, no: \boxed{4}") == ("4", "boxed")


@pytest.fixture(scope="module")
def pool() -> object:
    pytest.importorskip("math_verify", reason="the extra align-eval[math] is not installed")
    with EquivalencePool(workers=1, seconds=30) as pool:
        yield pool


def test_math_verify_decides_what_spelling_leaves_open(pool: EquivalencePool) -> None:
    golds = ["x^2+2x+1", r"\frac{\sqrt{3}}{3}", r"\{1,2\}", "72"]
    answers = ["(x+1)^2", r"\frac{1}{\sqrt{3}}", r"\{2,1\}", "7200"]
    completions = [rf"\boxed{{{answer}}}" for answer in answers]
    assert [verdict.flexible for verdict in grade(completions, golds)] == [False] * 4
    assert [verdict.flexible for verdict in grade(completions, golds, pool=pool)] == [True, True, True, False]


def test_a_comparison_that_hangs_is_cut_off_and_the_next_one_works() -> None:
    """A power tower keeps sympy busy or out of memory; either way this process waits `seconds` and goes on."""
    pytest.importorskip("math_verify", reason="the extra align-eval[math] is not installed")
    with EquivalencePool(workers=1, seconds=3) as pool:
        slow, fine = pool.compare([("1", "9^{9^{9^{9^{9}}}}+1"), ("1/2", "0.5")])
    assert not slow.equal
    assert fine.equal


def test_reward_keeps_the_contract_and_explains_unusable_gold() -> None:
    pytest.importorskip("math_verify", reason="the extra align-eval[math] is not installed")
    reward = MathVerifyReward(workers=1)
    completions = [r"\boxed{(x+1)^2}", r"\boxed{3}", "7"]
    columns = {"answer": ["x^2+2x+1", "4", "two\nlines"]}
    assert [score.value for score in reward(["q"] * 3, completions, columns)] == [1.0, 0.0, None]
    check_reward(reward, prompts=["q"] * 3, completions=completions, columns=columns)
    with pytest.raises(DataError, match="needs the column 'answer'; the data has 'id'"):
        reward(["q"], ["1"], {"id": [1]})
