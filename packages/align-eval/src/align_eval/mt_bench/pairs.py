"""Tables of pairwise comparison: win rates with intervals, and how much the judge depends on the order. Numbers only.

A match is won when the same model wins in both orders; anything else is a tie, as in FastChat. A match of which a game
has no verdict counts for nobody, and is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from align_eval.mt_bench.fastchat import PairRow
from align_eval.mt_bench.outcomes import Match
from align_eval.mt_bench.questions import Bench
from align_eval.statistics import Interval, cluster_bootstrap


@dataclass(frozen=True, kw_only=True, slots=True)
class WinRate:
    """One model against all it was compared with."""

    model: str
    wins: int
    losses: int
    ties: int
    win_rate: float
    loss_rate: float
    win_rate_adjusted: float
    """(wins + ties / 2) / all: FastChat's."""
    interval: Interval | None
    """Of win_rate_adjusted; None in compatible tables, which have none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderEffect:
    """How the judge's verdicts depend on which answer it sees first."""

    matches: int
    """With a verdict in both games."""
    inconsistent: int
    """Of them, games that ended differently once the answers were swapped."""
    first: int
    """Games won by the answer shown first."""
    second: int
    """Games won by the answer shown second."""
    failed: int
    """Matches without a verdict in one game or both."""

    @property
    def inconsistency(self) -> float | None:
        """inconsistent / matches."""
        return self.inconsistent / self.matches if self.matches else None


def win_rates(bench: Bench, matches: Sequence[Match]) -> list[WinRate]:
    """Each model's rates, the best first, with intervals that resample questions within their categories."""
    category = {question.id: question.category for question in bench.questions}
    points: dict[str, dict[int, list[float]]] = {}
    for match in matches:
        if None in match.winners or match.question_id not in category:
            continue
        winner = match_winner(*match.winners)
        for side, model in (("model_1", match.model_1), ("model_2", match.model_2)):
            point = 0.5 if winner == "tie" else float(winner == side)
            points.setdefault(model, {}).setdefault(match.question_id, []).append(point)
    rates = []
    for model, by_question in points.items():
        strata = [category[question] for question in by_question]
        sums, counts = [sum(v) for v in by_question.values()], [len(v) for v in by_question.values()]
        values = [point for v in by_question.values() for point in v]
        rates.append(_rate(model, values, cluster_bootstrap(sums, counts, strata=strata)))
    return sorted(rates, key=lambda rate: (-rate.win_rate_adjusted, rate.model))


def fastchat_win_rates(rows: Sequence[PairRow], *, baseline: str | None = None) -> list[WinRate]:
    """What FastChat's show_result prints for pairs, the best win_rate_adjusted first; repeated rows all count."""
    points: dict[str, list[float]] = {}
    for row in rows:
        if "error" in (row.g1_winner, row.g2_winner):
            continue
        if baseline is not None and baseline not in (row.model_1, row.model_2):
            continue
        winner = match_winner(row.g1_winner, row.g2_winner)
        for side, model in (("model_1", row.model_1), ("model_2", row.model_2)):
            points.setdefault(model, []).append(0.5 if winner == "tie" else float(winner == side))
    rates = [_rate(model, values, None) for model, values in points.items()]
    return sorted(rates, key=lambda rate: (-rate.win_rate_adjusted, rate.model))


def order_effect(matches: Sequence[Match]) -> OrderEffect:
    """Counts over all matches."""
    complete = [match for match in matches if None not in match.winners]
    shown_first: Mapping[int, str] = {0: "model_1", 1: "model_2"}
    games = [(game, winner) for match in complete for game, winner in enumerate(match.winners) if winner != "tie"]
    first = sum(winner == shown_first[game] for game, winner in games)
    return OrderEffect(
        matches=len(complete),
        inconsistent=sum(match.winners[0] != match.winners[1] for match in complete),
        first=first,
        second=len(games) - first,
        failed=len(matches) - len(complete),
    )


def match_winner(first: str | None, second: str | None) -> str | None:
    """The winner of a match from those of its games: the same in both, else a tie."""
    return first if first == second else "tie"


def _rate(model: str, points: Sequence[float], interval: Interval | None) -> WinRate:
    wins, ties = points.count(1.0), points.count(0.5)
    return WinRate(
        model=model,
        wins=wins,
        losses=len(points) - wins - ties,
        ties=ties,
        win_rate=wins / len(points),
        loss_rate=(len(points) - wins - ties) / len(points),
        win_rate_adjusted=(wins + 0.5 * ties) / len(points),
        interval=interval,
    )
