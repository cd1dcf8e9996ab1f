"""Asks the judge for every verdict that is not in the store yet, and stores each as it comes.

A verdict that cannot be read is asked for again in the same conversation, and then stored as failed, never as a number.
Requests that stayed unanswered are not stored: a later run asks them again. Knows nothing of services or files.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from align_core.contracts import Judge
from align_core.types import ChatReply, ChatRequest
from align_eval.cost import Budget
from align_eval.digest import digest
from align_eval.drive import Job, drive
from align_eval.errors import UnansweredError
from align_eval.mt_bench.grading import Grading
from align_eval.mt_bench.verdicts import (
    ReadRating,
    ReadWinner,
    compatible_rating,
    compatible_winner,
    strict_rating,
    strict_winner,
)
from align_eval.store import Key, Record, Store

KEY_FIELDS = ("question_id", "turn", "model", "other", "judge", "sample", "prompt_hash", "answer_hash", "settings")
"""What identifies a judgment: change any and it is another one. `other` is B of a pair, None in single grading."""

_REMINDERS = {
    "single": "Your reply does not end in a rating in the form that was asked for. Reply with the rating alone: "
    "a number from 1 to 10 in double square brackets, for example [[5]].",
    "pair": "Your reply does not end in a verdict in the form that was asked for. Reply with the verdict alone: "
    "[[A]] if assistant A is better, [[B]] if assistant B is better, or [[C]] for a tie.",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeSettings:
    """How the judge is asked; part of every judgment's key."""

    max_tokens: int = 2048
    """Most tokens of a verdict; FastChat's value."""
    temperature: float | None = 0.0
    """FastChat's value; None leaves it to the service, for models that accept no other."""
    reasks: int = 2
    """Times that a verdict which cannot be read is asked for again."""
    compatible: bool = False
    """Read verdicts as FastChat does, and ask once."""
    seed: int = 0
    """Sample k is asked with seed + k."""
    extra: str = ""
    """Further fields of the requests, as `JudgeConfig.extra`; here because they change verdicts."""

    @property
    def hash(self) -> str:
        """Changes with any setting."""
        return digest(asdict(self))

    def rating_reader(self) -> ReadRating:
        """Reads a rating out of a judgment."""
        return compatible_rating if self.compatible else strict_rating

    def winner_reader(self) -> ReadWinner:
        """Reads a winner out of a judgment."""
        return compatible_winner if self.compatible else strict_winner


class Tally(NamedTuple):
    """How a run of the judge went."""

    asked: int
    """Judgments that were made in this run."""
    stored: int
    """Judgments of the plan that the store holds now."""
    planned: int
    unanswered: list[UnansweredError]
    unaffordable: int
    """Judgments that the budget did not let through."""


async def judge_all(
    judge: Judge,
    judge_name: str,
    gradings: Sequence[Grading],
    store: Store,
    *,
    settings: JudgeSettings,
    budget: Budget,
    at_once: int,
    progress: Callable[[], None] = lambda: None,
) -> Tally:
    """Makes the judgments of `gradings` that `store` lacks.

    Args:
        judge_name: the judge's name in keys and files.
        at_once: judgments begun at a time; the judge's own limits come below.
        progress: called after each judgment.

    Raises:
        RefusedError: the service refused; what is in the store stays.
    """
    missing = [grading for grading in gradings if key_of(grading, judge_name, settings) not in store]
    before = len(store)

    def job(grading: Grading) -> Job:
        async def run() -> None:
            record = await _judge_one(judge, judge_name, grading, settings=settings, budget=budget)
            if record is not None:
                store.append(record)
                progress()

        return run

    unanswered = await drive([job(grading) for grading in missing], at_once=at_once)
    stored = sum(key_of(grading, judge_name, settings) in store for grading in gradings)
    return Tally(
        asked=len(store) - before,
        stored=stored,
        planned=len(gradings),
        unanswered=unanswered,
        unaffordable=len(gradings) - stored - len(unanswered),
    )


def key_of(grading: Grading, judge_name: str, settings: JudgeSettings) -> Key:
    """The key of a judgment, in the order of KEY_FIELDS."""
    other = grading.models[1] if len(grading.models) > 1 else None
    identity = (grading.question_id, grading.turn, grading.models[0], other, judge_name, grading.sample)
    return (*identity, grading.prompt_hash, grading.answer_hash, settings.hash)


def request_of(grading: Grading, settings: JudgeSettings) -> ChatRequest:
    """The first request of a judgment."""
    return ChatRequest(
        messages=grading.messages(),
        max_tokens=settings.max_tokens,
        temperature=settings.temperature,
        seed=settings.seed + grading.sample,
    )


async def _judge_one(
    judge: Judge, judge_name: str, grading: Grading, *, settings: JudgeSettings, budget: Budget
) -> Record | None:
    """The judgment's record; None when the budget does not allow it."""
    request = request_of(grading, settings)
    read = settings.rating_reader() if grading.mode == "single" else settings.winner_reader()
    replies: list[ChatReply] = []
    for _ in range(1 if settings.compatible else 1 + settings.reasks):
        reply = await _ask(judge, request, budget)
        if reply is None:
            return None
        replies.append(reply)
        # A reply that was cut off may have gone on to another verdict.
        verdict = read(reply.text) if settings.compatible or reply.finish_reason != "length" else None
        if verdict is not None:
            break
        reminder = {"role": "user", "content": _REMINDERS[grading.mode]}
        said = {"role": "assistant", "content": reply.text}
        request = ChatRequest(
            messages=(*grading.messages(), said, reminder),
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed,
        )
    failure = None if verdict is not None else ("cut off" if replies[-1].finish_reason == "length" else "no verdict")
    return {
        **dict(zip(KEY_FIELDS, key_of(grading, judge_name, settings))),
        "prompt": grading.prompt.name,
        "verdict": verdict,
        "failure": failure,
        "replies": [reply.text for reply in replies],
        "judge_model": replies[-1].model,
        "prompt_tokens": _total([reply.prompt_tokens for reply in replies]),
        "completion_tokens": _total([reply.completion_tokens for reply in replies]),
        "tstamp": time.time(),
    }


async def _ask(judge: Judge, request: ChatRequest, budget: Budget) -> ChatReply | None:
    if not budget.reserve(request):
        return None
    reply, lost = None, 0
    try:
        reply = await judge.reply(request)
    except UnansweredError as error:
        lost = error.lost_attempts
        raise
    finally:
        budget.settle(request, reply, lost_attempts=lost)
    return reply


def _total(counts: Sequence[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
