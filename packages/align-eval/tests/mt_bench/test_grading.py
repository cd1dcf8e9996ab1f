"""What the judge reads: which prompt, which fields, and what makes two gradings different."""

from typing import Any

import pytest

from align_core.errors import DataError
from align_eval.mt_bench.fastchat import Answer
from align_eval.mt_bench.grading import check_answers, model_pairs, pair_gradings, single_gradings
from align_eval.mt_bench.questions import Bench


def _answers(bench: Bench, *models: str) -> dict[str, dict[int, Answer]]:
    return {
        model: {
            q.id: Answer(question_id=q.id, model=model, turns=(f"{model} one", f"{model} {{two}}"), tstamp=0.0)
            for q in bench.questions
        }
        for model in models
    }


def test_single_grading_asks_about_each_turn(bench: Bench) -> None:
    gradings = single_gradings(bench, _answers(bench, "m"), samples=2)
    assert len(gradings) == 80 * 2 * 2
    first, _, second, _ = gradings[:4]
    assert first.messages() == (
        {"role": "system", "content": "You judge (single-v1)."},
        {"role": "user", "content": "Rate this.\nQuestion: First 81?\nAnswer: m one\nGive [[rating]]."},
    )
    assert second.prompt.name == "single-v1-multi-turn"
    assert second.user_prompt == "1: First 81?\nm one\n2: Then 81 {x}?\nm {two}"


def test_math_reasoning_and_coding_show_the_reference(bench: Bench) -> None:
    gradings = {(g.question_id, g.turn): g for g in single_gradings(bench, _answers(bench, "m"))}
    assert gradings[101, 1].prompt.name == "single-math-v1"
    assert "Right: right 101" in gradings[101, 1].user_prompt
    assert "also" not in gradings[101, 1].user_prompt
    assert gradings[111, 2].prompt.name == "single-math-v1-multi-turn"
    assert "Right: right 111, also right 111" in gradings[111, 2].user_prompt
    with_reference = {g.question_id for g in gradings.values() if "math" in g.prompt.name}
    assert with_reference == set(range(101, 131))


def test_pairs_come_in_both_orders(bench: Bench) -> None:
    gradings = pair_gradings(bench, _answers(bench, "x", "y", "z"))
    assert len(gradings) == 3 * 80 * 2 * 2
    assert {g.models for g in gradings} == {(a, b) for a in "xyz" for b in "xyz" if a != b}
    one = next(g for g in gradings if g.models == ("y", "x") and g.question_id == 101 and g.turn == 1)
    assert one.prompt.name == "pair-math-v1"
    assert one.user_prompt == "Question: First 101?\nRight: right 101\nA: y one\nB: x one"
    two = next(g for g in gradings if g.models == ("x", "y") and g.question_id == 81 and g.turn == 2)
    assert two.prompt.name == "pair-v2-multi-turn"
    assert "2: Then 81 {x}?\nA: x {two}\nB: y {two}" in two.user_prompt


def test_baseline_meets_every_other_model_and_is_the_second() -> None:
    assert list(model_pairs(["x", "base", "y"], baseline="base")) == [("x", "base"), ("y", "base")]
    assert list(model_pairs(["x", "y", "z"])) == [("x", "y"), ("x", "z"), ("y", "z")]
    with pytest.raises(DataError, match="baseline 'b' has no answers"):
        list(model_pairs(["x", "y"], baseline="b"))


def test_hashes_change_with_what_is_judged(bench: Bench) -> None:
    answers: Any = _answers(bench, "m")
    before = {(g.question_id, g.turn): (g.prompt_hash, g.answer_hash) for g in single_gradings(bench, answers)}
    answers["m"][81] = Answer(question_id=81, model="m", turns=("m one", "changed"), tstamp=9.0)
    after = {(g.question_id, g.turn): (g.prompt_hash, g.answer_hash) for g in single_gradings(bench, answers)}
    assert {key for key in before if before[key] != after[key]} == {(81, 2)}


def test_incomplete_answers_are_refused(bench: Bench) -> None:
    answers: Any = _answers(bench, "m")
    answers["m"][90] = Answer(question_id=90, model="m", turns=("only one",), tstamp=0.0)
    del answers["m"][91]
    with pytest.raises(DataError, match="'m' lacks answers to 2 of 80 questions: 90, 91"):
        check_answers(bench, answers)
