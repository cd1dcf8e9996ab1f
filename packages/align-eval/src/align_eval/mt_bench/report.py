"""The report's content: every table as plain data, and as Markdown. The page is made of the same in `page`.

Knows nothing of stores or services.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata

from align_eval.mt_bench.outcomes import Match, Rating
from align_eval.mt_bench.pairs import OrderEffect, WinRate, fastchat_win_rates, order_effect, win_rates
from align_eval.mt_bench.questions import Bench
from align_eval.mt_bench.single import Cell, Difference, ModelScores, differences, fastchat_means, model_scores

_WEAK = 0.05  # share of missing verdicts above which the means are called unreliable


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """All that the three files show."""

    title: str
    created: str
    """Date and time, UTC."""
    version: str
    """Of align-eval."""
    judge: str
    warnings: tuple[str, ...]
    categories: tuple[str, ...]
    models: tuple[ModelScores, ...]
    differences: tuple[Difference, ...]
    win_rates: tuple[WinRate, ...]
    order: OrderEffect | None
    fastchat_means: Mapping[str, Mapping[str, float]]
    """As FastChat's show_result computes them from the same scores."""
    fastchat_win_rates: tuple[WinRate, ...]
    judging: Mapping[str, object]
    """Settings and counts of the judge's runs, by kind."""
    answering: Mapping[str, Mapping[str, object]]
    """Settings and counts of the answers, by model."""


def build_report(
    bench: Bench,
    *,
    judge: str,
    ratings: Sequence[Rating],
    matches: Sequence[Match],
    judging: Mapping[str, object],
    answering: Mapping[str, Mapping[str, object]],
) -> Report:
    """Computes every table."""
    models = model_scores(bench, ratings)
    order = order_effect(matches) if matches else None
    return Report(
        title="MT-Bench",
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("align-eval"),
        judge=judge,
        warnings=(
            *_judge_warnings(models, order),
            *_option_warnings(judging),
            *_answer_warnings(answering),
            *bench.warnings(),
        ),
        categories=tuple(bench.categories()),
        models=tuple(models),
        differences=tuple(differences(bench, ratings)),
        win_rates=tuple(win_rates(bench, matches)),
        order=order,
        fastchat_means=fastchat_means([rating.row() for rating in ratings]),
        fastchat_win_rates=tuple(fastchat_win_rates([match.row() for match in matches])),
        judging=judging,
        answering=answering,
    )


def as_json(report: Report) -> dict[str, object]:
    """The report for programs."""
    return asdict(report)


def as_markdown(report: Report) -> str:
    """The report for people who read text."""
    parts = [
        f"# {report.title}",
        f"Judge: {_inline(report.judge)}. Made {report.created} by align-eval {report.version}.",
        *(f"**Warning:** {_inline(warning)}" for warning in report.warnings),
    ]
    if report.models:
        parts += ["## Scores", SCORES_NOTE, _score_table(report)]
        parts += ["## Turns and means", TURN_NOTE, _turn_table(report)]
    if report.differences:
        parts += ["## Differences between models", DIFFERENCE_NOTE, _difference_table(report.differences)]
    if report.order is not None:
        parts += ["## Pairwise comparison", PAIR_NOTE, _pair_table(report.win_rates), order_sentence(report.order)]
    if report.fastchat_means:
        parts += ["## As FastChat computes it", FASTCHAT_NOTE, _fastchat_table(report)]
    parts += ["## How it was made", _provenance(report)]
    return "\n\n".join(parts) + "\n"


SCORES_NOTE = (
    "Mean of the judge's ratings, 1 to 10; beside it how many judgments have a rating, of those expected. "
    "Avg is the mean over all judgments."
)
TURN_NOTE = (
    "With 95 % intervals from resampling questions within their categories. Avg is the mean over all judgments "
    "(micro), beside it the mean of the categories' means (macro). Spread: the judge's standard deviation between its "
    "samples of the same answer."
)
DIFFERENCE_NOTE = (
    "On the same questions and turns, with a 95 % interval and a two-sided p-value (signs of questions flipped at "
    "random). A paired difference is much surer than two means side by side."
)
PAIR_NOTE = (
    "A match is won by the model that wins in both orders; anything else is a tie. Adjusted: a tie is half a win; with "
    "a 95 % interval."
)
FASTCHAT_NOTE = "Missing ratings are dropped silently there; given to compare with figures published elsewhere."


def cell_text(cell: Cell) -> str:
    """`4.25 [20/20]`, or a dash where there is no rating."""
    value = "-" if cell.mean is None else f"{cell.mean:.2f}"
    return f"{value} [{cell.valid}/{cell.expected}]"


def interval_text(cell: Cell) -> str:
    """`4.25 (3.90 to 4.61)`."""
    if cell.mean is None or cell.interval is None:
        return "-"
    return f"{cell.mean:.2f} ({cell.interval.low:.2f} to {cell.interval.high:.2f})"


def order_sentence(order: OrderEffect) -> str:
    """How much the order matters, in words."""
    if order.inconsistency is None:
        return f"No match has a verdict in both orders; {order.failed} have none."
    return (
        f"In {order.inconsistent} of {order.matches} matches ({order.inconsistency:.0%}) the verdict changed when the "
        f"answers were swapped. Of the games that were decided, the answer shown first won {order.first} and the one "
        f"shown second {order.second}. {order.failed} more matches lack a verdict in one order or both."
    )


def _judge_warnings(models: Sequence[ModelScores], order: OrderEffect | None) -> list[str]:
    warnings: list[str] = []
    expected = sum(model.micro.expected for model in models)
    missing = expected - sum(model.micro.valid for model in models)
    if missing:
        reasons: dict[str, int] = {}
        for model in models:
            for reason, count in model.failures.items():
                reasons[reason] = reasons.get(reason, 0) + count
        listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
        rest = f"The means rest on the other {expected - missing}."
        if missing == expected:
            rest = "There are no means: this judge cannot do the task."
        elif missing > _WEAK * expected:
            rest = f"{rest[:-1]}: this judge is too weak for its figures to mean much."
        warnings.append(
            f"{missing} of {expected} judgments ({missing / expected:.0%}) have no rating ({listed}). {rest}"
        )
    if order is not None and order.inconsistency is not None and order.inconsistency > 0.5:
        warnings.append(
            f"the judge changes its verdict in {order.inconsistency:.0%} of the matches when the answers are swapped; "
            "it sees the order more than the answers"
        )
    return warnings


def _option_warnings(judging: Mapping[str, object]) -> list[str]:
    """Of options that shape what the judge says."""
    extras = [value for name, value in flat(judging) if name.endswith("settings.extra")]
    return [
        f"the service was asked to shape the judge's replies ({extra}): that a verdict has the right form says nothing "
        "of its worth"
        for extra in dict.fromkeys(extras)
    ]


def _answer_warnings(answering: Mapping[str, Mapping[str, object]]) -> list[str]:
    words = {
        "cut_off": "turns were cut off at the token limit",
        "empty": "turns are empty",
        "prompts_cut": "turns were answered to a prompt cut to fit the context",
    }
    return [
        f"{model}: {summary[name]} of {summary.get('answered', '?')} {text}"
        for model, summary in answering.items()
        for name, text in words.items()
        if summary.get(name)
    ]


def _score_table(report: Report) -> str:
    rows = [[category, *(cell_text(m.categories[category]) for m in report.models)] for category in report.categories]
    rows.append(["**Avg**", *(f"**{cell_text(model.micro)}**" for model in report.models)])
    return _table(["category", *(model.model for model in report.models)], rows)


def _turn_table(report: Report) -> str:
    turns = sorted({turn for model in report.models for turn in model.turns})
    header = [
        "model",
        *(f"turn {turn}" for turn in turns),
        "Avg",
        "mean of categories",
        "spread",
    ]
    rows = [
        [
            model.model,
            *(interval_text(model.turns[turn]) for turn in turns),
            interval_text(model.micro),
            interval_text(model.macro),
            "-" if model.judge_sd is None else f"{model.judge_sd:.2f}",
        ]
        for model in report.models
    ]
    return _table(header, rows)


def _difference_table(found: Sequence[Difference]) -> str:
    rows = [
        [
            f"{d.first} - {d.second}",
            f"{d.mean:+.2f} ({d.interval.low:+.2f} to {d.interval.high:+.2f})",
            p_text(d.p),
            str(d.pairs),
        ]
        for d in found
    ]
    return _table(["models", "difference", "p", "turns compared"], rows)


def p_text(p: float) -> str:
    """A p-value with as many digits as it has."""
    return f"{p:.4f}" if p < 0.01 else f"{p:.2f}"


def _pair_table(rates: Sequence[WinRate]) -> str:
    rows = [
        [
            rate.model,
            *map(str, (rate.wins, rate.losses, rate.ties)),
            f"{rate.win_rate:.1%}",
            f"{rate.loss_rate:.1%}",
            f"{rate.win_rate_adjusted:.1%}"
            + (f" ({rate.interval.low:.1%} to {rate.interval.high:.1%})" if rate.interval else ""),
        ]
        for rate in rates
    ]
    return _table(["model", "wins", "losses", "ties", "win rate", "loss rate", "adjusted"], rows)


def _fastchat_table(report: Report) -> str:
    names = sorted(
        {name for means in report.fastchat_means.values() for name in means}, key=lambda n: (n == "average", n)
    )
    rows = [
        [model, *(f"{means[name]:.6f}" if name in means else "-" for name in names)]
        for model, means in sorted(report.fastchat_means.items(), key=lambda item: -item[1].get("average", 0.0))
    ]
    return _table(["model", *names], rows)


def fastchat_columns(means: Mapping[str, Mapping[str, float]]) -> list[str]:
    """`turn 1`, `turn 2` and `average`, those that there are."""
    return sorted({name for by_name in means.values() for name in by_name}, key=lambda n: (n == "average", n))


def _provenance(report: Report) -> str:
    lines = [f"* {_inline(name)}: {_inline(value)}" for name, value in flat(report.judging)]
    for model, summary in report.answering.items():
        told = ", ".join(f"{name} {value}" for name, value in summary.items() if value not in ("", None, []))
        lines.append(f"* answers of {_inline(model)}: {_inline(told)}")
    return "\n".join(lines) or "Nothing is known about how these judgments were made."


def flat(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    """Nested settings as dotted names and values, empty ones left out."""
    found: list[tuple[str, object]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        elif value not in ("", None, [], ()):
            found.append((f"{prefix}{name}", value))
    return found


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(_inline(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _inline(value: object) -> str:
    """One line of text that Markdown does not take for HTML."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")
