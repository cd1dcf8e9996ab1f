"""Tables of single grading: means with intervals for each model, and differences between models. Numbers only.

Means are over judgments that have a verdict; how many those are of how many expected is part of every cell. `micro` is
the mean over all judgments (FastChat's), `macro` the mean of the categories' means. Intervals resample questions within
their categories: the two turns of a question hang together, and ten questions a category are the benchmark's design.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, pstdev

from align_eval.mt_bench.fastchat import NO_SCORE, SingleRow
from align_eval.mt_bench.outcomes import Rating
from align_eval.mt_bench.questions import Bench
from align_eval.statistics import Interval, cluster_bootstrap, sign_flip_p, stratified_mean_bootstrap


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """A mean, how sure it is, and what it rests on."""

    mean: float | None
    """None when no judgment has a verdict."""
    interval: Interval | None
    valid: int
    expected: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelScores:
    """One model's row of the table."""

    model: str
    micro: Cell
    macro: Cell
    turns: Mapping[int, Cell]
    categories: Mapping[str, Cell]
    failures: Mapping[str, int]
    """Judgments without a verdict, by reason; `not judged` for those that were never made."""
    judge_sd: float | None
    """Standard deviation of the judge's samples of the same answer, averaged; None for one sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Two models on the same questions: mean of (first - second) over turns that both have a verdict for."""

    first: str
    second: str
    mean: float
    interval: Interval
    p: float
    """Two-sided, by flipping signs of questions."""
    pairs: int
    """(question, turn) that count."""


def model_scores(bench: Bench, ratings: Sequence[Rating]) -> list[ModelScores]:
    """The table, models in the order of their names."""
    models = sorted({rating.model for rating in ratings})
    return [_model(bench, model, [rating for rating in ratings if rating.model == model]) for model in models]


def differences(bench: Bench, ratings: Sequence[Rating]) -> list[Difference]:
    """Every pair of models that have a judged turn in common."""
    category = {question.id: question.category for question in bench.questions}
    scores: dict[str, dict[tuple[int, int], float]] = {}
    for rating in ratings:
        if rating.score is not None and rating.question_id in category:
            scores.setdefault(rating.model, {})[rating.question_id, rating.turn] = rating.score
    found: list[Difference] = []
    for first, second in combinations(sorted(scores), 2):
        by_question: dict[int, list[float]] = {}
        for key in scores[first].keys() & scores[second].keys():
            by_question.setdefault(key[0], []).append(scores[first][key] - scores[second][key])
        if not by_question:
            continue
        ids = sorted(by_question)
        sums, counts = [sum(by_question[i]) for i in ids], [len(by_question[i]) for i in ids]
        found.append(
            Difference(
                first=first,
                second=second,
                mean=sum(sums) / sum(counts),
                interval=cluster_bootstrap(sums, counts, strata=[category[i] for i in ids]),
                p=sign_flip_p(sums),
                pairs=sum(counts),
            )
        )
    return found


def fastchat_means(rows: Sequence[SingleRow]) -> dict[str, dict[str, float]]:
    """What FastChat's show_result prints: `turn 1`, `turn 2` and `average` of each model.

    Scores of -1 are dropped without a word, repeated judgments are all averaged in.
    """
    values: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        if row.score != NO_SCORE:
            of_model = values.setdefault(row.model, {})
            of_model.setdefault(f"turn {row.turn}", []).append(row.score)
            of_model.setdefault("average", []).append(row.score)
    return {model: {name: mean(scores) for name, scores in by_name.items()} for model, by_name in values.items()}


def _model(bench: Bench, model: str, ratings: Sequence[Rating]) -> ModelScores:
    found = {(rating.question_id, rating.turn): rating for rating in ratings}
    expected = [(q.id, turn, q.category) for q in bench.questions for turn in range(1, len(q.turns) + 1)]
    spreads = [pstdev(valid) for r in ratings if len(valid := [s for s in r.scores if s is not None]) > 1]
    turns = sorted({turn for _, turn, _ in expected})
    failures: Counter[str] = Counter()
    for question, turn, _ in expected:
        rating = found.get((question, turn))
        if rating is None:
            failures["not judged"] += 1
        elif rating.score is None:
            failures[next(reason for reason in rating.failures if reason)] += 1
    return ModelScores(
        model=model,
        micro=_cell(found, expected),
        macro=_cell(found, expected, macro=True),
        turns={turn: _cell(found, [e for e in expected if e[1] == turn]) for turn in turns},
        categories={name: _cell(found, [e for e in expected if e[2] == name]) for name in bench.categories()},
        failures=dict(failures),
        judge_sd=mean(spreads) if spreads else None,
    )


def _cell(
    found: Mapping[tuple[int, int], Rating], expected: Sequence[tuple[int, int, str]], *, macro: bool = False
) -> Cell:
    by_question: dict[int, list[float]] = {}
    category: dict[int, str] = {}
    for question, turn, name in expected:
        rating = found.get((question, turn))
        if rating is not None and rating.score is not None:
            by_question.setdefault(question, []).append(rating.score)
            category[question] = name
    if not by_question:
        return Cell(mean=None, interval=None, valid=0, expected=len(expected))
    sums = [sum(values) for values in by_question.values()]
    counts = [len(values) for values in by_question.values()]
    strata = [category[question] for question in by_question]
    if macro:
        of_category = {
            name: mean([v for question, values in by_question.items() if category[question] == name for v in values])
            for name in dict.fromkeys(strata)
        }
        value, interval = mean(of_category.values()), stratified_mean_bootstrap(sums, counts, strata)
    else:
        value, interval = sum(sums) / sum(counts), cluster_bootstrap(sums, counts, strata=strata)
    return Cell(mean=value, interval=interval, valid=sum(counts), expected=len(expected))
