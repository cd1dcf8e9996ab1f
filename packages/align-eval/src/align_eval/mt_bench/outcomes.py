"""What was judged, in the form that reports need, whether it came from our store or from FastChat's files.

A `Rating` is one answer's score with all samples behind it; a `Match` is two answers compared in both orders. Knows
nothing of statistics.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from align_core.errors import DataError
from align_eval.json_lines import read_rows
from align_eval.mt_bench.fastchat import NO_SCORE, PairRow, SingleRow
from align_eval.mt_bench.grading import Grading
from align_eval.mt_bench.verdicts import strict_rating, strict_winner
from align_eval.results import write_json_lines
from align_eval.store import Record

GameWinner = Literal["model_1", "model_2", "tie"]
_NO_VERDICT = "no verdict"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rating:
    """The judge's score of one model's answer at one turn."""

    question_id: int
    turn: int
    model: str
    judge: str
    prompt: str
    """Name of the judge prompt."""
    user_prompt: str
    scores: tuple[float | None, ...]
    """One a sample; None where the judge gave no verdict."""
    failures: tuple[str | None, ...]
    """Why there is none, one a sample."""
    judgments: tuple[str, ...]
    """The judge's words, one a sample; replies to re-asks are joined by blank lines."""
    tstamp: float

    @property
    def score(self) -> float | None:
        """The median of the samples that have a verdict; None when none has."""
        valid = [score for score in self.scores if score is not None]
        return median(valid) if valid else None

    def row(self) -> SingleRow:
        """In FastChat's format: the median, and the words of the sample nearest to it."""
        value = self.score
        nearest = 0
        if value is not None:
            distances = [abs(score - value) if score is not None else float("inf") for score in self.scores]
            nearest = distances.index(min(distances))
        return SingleRow(
            question_id=self.question_id,
            model=self.model,
            judge=(self.judge, self.prompt),
            user_prompt=self.user_prompt,
            judgment=self.judgments[nearest],
            score=float(NO_SCORE) if value is None else value,
            turn=self.turn,
            tstamp=self.tstamp,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """Two models' answers at one turn, compared with the first as A (game 1) and with the second as A (game 2)."""

    question_id: int
    turn: int
    model_1: str
    model_2: str
    judge: str
    prompt: str
    winners: tuple[GameWinner | None, GameWinner | None]
    """Of game 1 and game 2; the majority of their samples, None where the judge gave no verdict."""
    user_prompts: tuple[str, str]
    judgments: tuple[str, str]
    tstamp: float

    def row(self) -> PairRow:
        """In FastChat's format."""
        first, second = (winner or "error" for winner in self.winners)
        return PairRow(
            question_id=self.question_id,
            model_1=self.model_1,
            model_2=self.model_2,
            g1_winner=first,
            g2_winner=second,
            judge=(self.judge, self.prompt),
            g1_user_prompt=self.user_prompts[0],
            g1_judgment=self.judgments[0],
            g2_user_prompt=self.user_prompts[1],
            g2_judgment=self.judgments[1],
            turn=self.turn,
            tstamp=self.tstamp,
        )


def ratings_of(gradings: Iterable[Grading], records: Mapping[Grading, Record]) -> list[Rating]:
    """The single gradings that have a record, samples of the same answer together."""
    groups: dict[tuple[object, ...], list[Grading]] = {}
    for grading in gradings:
        if grading.mode == "single" and grading in records:
            groups.setdefault((grading.models, grading.question_id, grading.turn), []).append(grading)
    return [_rating(group, [records[grading] for grading in group]) for group in groups.values()]


def _rating(group: Sequence[Grading], records: Sequence[Mapping[str, Any]]) -> Rating:
    return Rating(
        question_id=group[0].question_id,
        turn=group[0].turn,
        model=group[0].models[0],
        judge=str(records[0]["judge"]),
        prompt=group[0].prompt.name,
        user_prompt=group[0].user_prompt,
        scores=tuple(record["verdict"] for record in records),
        failures=tuple(record["failure"] for record in records),
        judgments=tuple("\n\n".join(record["replies"]) for record in records),
        tstamp=max(record["tstamp"] for record in records),
    )


def matches_of(
    gradings: Iterable[Grading], records: Mapping[Grading, Record], pairs: Iterable[tuple[str, str]]
) -> list[Match]:
    """The matches of which both games have a record in every sample that was judged."""
    games: dict[tuple[tuple[str, ...], int, int], list[Grading]] = {}
    for grading in gradings:
        if grading.mode == "pair" and grading in records:
            games.setdefault((grading.models, grading.question_id, grading.turn), []).append(grading)
    matches: list[Match] = []
    for first, second in pairs:
        for (models, question, turn), game_1 in games.items():
            game_2 = games.get(((second, first), question, turn))
            if models == (first, second) and game_2:
                matches.append(_match(game_1, game_2, records))
    return matches


def _match(game_1: Sequence[Grading], game_2: Sequence[Grading], records: Mapping[Grading, Mapping[str, Any]]) -> Match:
    first, second = [records[g] for g in game_1], [records[g] for g in game_2]
    sides: tuple[Mapping[str, GameWinner], Mapping[str, GameWinner]] = (
        {"A": "model_1", "B": "model_2", "tie": "tie"},
        {"A": "model_2", "B": "model_1", "tie": "tie"},
    )
    return Match(
        question_id=game_1[0].question_id,
        turn=game_1[0].turn,
        model_1=game_1[0].models[0],
        model_2=game_1[0].models[1],
        judge=str(first[0]["judge"]),
        prompt=game_1[0].prompt.name,
        winners=(_majority(first, sides[0]), _majority(second, sides[1])),
        user_prompts=(game_1[0].user_prompt, game_2[0].user_prompt),
        judgments=("\n\n".join(first[0]["replies"]), "\n\n".join(second[0]["replies"])),
        tstamp=max(record["tstamp"] for record in (*first, *second)),
    )


def _majority(records: Sequence[Mapping[str, Any]], sides: Mapping[str, GameWinner]) -> GameWinner | None:
    """The winner of most samples; a tie when several lead; None when no sample has a verdict."""
    counts = Counter(sides[record["verdict"]] for record in records if record["verdict"] is not None).most_common()
    if not counts:
        return None
    return "tie" if len(counts) > 1 and counts[0][1] == counts[1][1] else counts[0][0]


def strict_ratings(rows: Sequence[SingleRow]) -> list[Rating]:
    """Published judgments, read anew by the strict parser; of repeated ones the last counts."""
    last = {(row.model, row.question_id, row.turn, row.judge[0]): row for row in rows}
    return [
        Rating(
            question_id=row.question_id,
            turn=row.turn,
            model=row.model,
            judge=row.judge[0],
            prompt=row.judge[1],
            user_prompt=row.user_prompt,
            scores=(score,),
            failures=(None if score is not None else _NO_VERDICT,),
            judgments=(row.judgment,),
            tstamp=row.tstamp,
        )
        for row in last.values()
        for score in (strict_rating(row.judgment),)
    ]


def strict_matches(rows: Sequence[PairRow]) -> list[Match]:
    """Published pairwise judgments, read anew by the strict parser; of repeated ones the last counts."""
    last = {(row.model_1, row.model_2, row.question_id, row.turn, row.judge[0]): row for row in rows}
    matches = []
    for row in last.values():
        first: Mapping[str | None, GameWinner] = {"A": "model_1", "B": "model_2", "tie": "tie"}
        second: Mapping[str | None, GameWinner] = {"A": "model_2", "B": "model_1", "tie": "tie"}
        matches.append(
            Match(
                question_id=row.question_id,
                turn=row.turn,
                model_1=row.model_1,
                model_2=row.model_2,
                judge=row.judge[0],
                prompt=row.judge[1],
                winners=(first.get(strict_winner(row.g1_judgment)), second.get(strict_winner(row.g2_judgment))),
                user_prompts=(row.g1_user_prompt, row.g2_user_prompt),
                judgments=(row.g1_judgment, row.g2_judgment),
                tstamp=row.tstamp,
            )
        )
    return matches


def write_outcomes(path: Path, outcomes: Iterable[Rating | Match]) -> None:
    """Replaces `path` by the outcomes with all their samples, atomically."""
    write_json_lines(path, (asdict(outcome) for outcome in outcomes))


def read_ratings(path: Path) -> list[Rating]:
    """What `write_outcomes` wrote of ratings."""
    lists = ("scores", "failures", "judgments")
    return [Rating(**{**row, **{n: tuple(row[n]) for n in lists}}) for row in _outcome_rows(path, Rating)]


def read_matches(path: Path) -> list[Match]:
    """What `write_outcomes` wrote of matches."""
    lists = ("winners", "user_prompts", "judgments")
    return [Match(**{**row, **{n: tuple(row[n]) for n in lists}}) for row in _outcome_rows(path, Match)]


def _outcome_rows(path: Path, kind: type[Rating] | type[Match]) -> Iterable[Mapping[str, Any]]:
    names = kind.__dataclass_fields__.keys()
    for _, where, row in read_rows(path, sorted(names)):
        if row.keys() != names:
            raise DataError(f"{where}: written by another version of align-eval; run `align-eval mt-bench judge` again")
        yield row
