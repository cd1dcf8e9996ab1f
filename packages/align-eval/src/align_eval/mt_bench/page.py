"""The report as one page that needs nothing else: no script, no network, no fonts; a radar plot and every judgment.

Whatever models wrote is escaped by the template engine, and a content policy in the page forbids scripts besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from align_eval.mt_bench import report as text
from align_eval.mt_bench.fastchat import Answer
from align_eval.mt_bench.outcomes import Match, Rating
from align_eval.mt_bench.questions import Bench, Question
from align_eval.mt_bench.radar import radar_svg
from align_eval.mt_bench.report import Report
from align_eval.results import write_text


@dataclass(frozen=True, kw_only=True, slots=True)
class Graded:
    """One judged turn of one model, for the page."""

    model: str
    turn: int
    answer: str | None
    """None where only the judge's prompt is known."""
    rating: Rating

    @property
    def score(self) -> str:
        """`7`, `7.5`, or what is wrong."""
        value = self.rating.score
        return f"{value:g}" if value is not None else next(reason for reason in self.rating.failures if reason)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One question with all that was judged of it."""

    question: Question
    references: tuple[str, ...]
    graded: tuple[Graded, ...]
    matches: tuple[Match, ...]

    @property
    def summary(self) -> str:
        """`model: 7, 5` for each model."""
        models = dict.fromkeys(item.model for item in self.graded)
        return " · ".join(
            f"{model}: " + ", ".join(item.score for item in self.graded if item.model == model) for model in models
        )


def write_page(
    path: Path,
    report: Report,
    bench: Bench,
    *,
    ratings: Sequence[Rating],
    matches: Sequence[Match],
    answers: Mapping[str, Mapping[int, Answer]],
) -> None:
    """Replaces `path` by the page, atomically."""
    environment = Environment(
        loader=PackageLoader("align_eval.mt_bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    entries = _entries(bench, ratings, matches, answers)
    page = environment.get_template("report.html.jinja").render(
        report=report,
        text=text,
        radar=_radar(report),
        entries={name: [e for e in entries if e.question.category == name] for name in report.categories},
        provenance=text.flat(report.judging),
    )
    write_text(path, page)


def _radar(report: Report) -> str:
    """The plot; made here of numbers and escaped names, so that the template may take it as it is."""
    if not report.models or len(report.categories) < 3:
        return ""
    return radar_svg(
        report.categories,
        {model.model: [model.categories[name].mean for name in report.categories] for model in report.models},
    )


def _entries(
    bench: Bench, ratings: Sequence[Rating], matches: Sequence[Match], answers: Mapping[str, Mapping[int, Answer]]
) -> list[Entry]:
    return [
        Entry(
            question=question,
            references=bench.references.get(question.id, ()),
            graded=tuple(
                Graded(model=rating.model, turn=rating.turn, answer=_answer(answers, rating), rating=rating)
                for rating in sorted(ratings, key=lambda rating: (rating.model, rating.turn))
                if rating.question_id == question.id
            ),
            matches=tuple(match for match in matches if match.question_id == question.id),
        )
        for question in bench.questions
    ]


def _answer(answers: Mapping[str, Mapping[int, Answer]], rating: Rating) -> str | None:
    answer = answers.get(rating.model, {}).get(rating.question_id)
    return answer.turns[rating.turn - 1] if answer is not None and len(answer.turns) >= rating.turn else None
