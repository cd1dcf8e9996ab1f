"""One model's answer sheet: which turns are answered, what is to be asked next, and the answers in the end.

Turns are keyed by all that shapes them (model, conversation, template, sampling): a changed setting asks again, an
unchanged one never does. Knows the store, but nothing of how answers are made.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from align_core.types import FinishReason
from align_eval.digest import digest
from align_eval.mt_bench.fastchat import Answer
from align_eval.mt_bench.questions import Question
from align_eval.store import Record, Store

KEY_FIELDS = ("question_id", "turn", "model", "request_hash")
"""What identifies an answered turn."""
TEMPERATURES: Mapping[str, float] = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""FastChat's, by category."""
_OTHER_TEMPERATURE = 0.7  # of a category that is not in the table; FastChat's too

Conversation = tuple[Mapping[str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerSettings:
    """How answers are made."""

    source: str
    """What answers: a fingerprint of the model's files with engine, precision and context; or a service."""
    template: str
    """The template's definite name, or `server` where the service applies its own."""
    template_hash: str
    """Changes with what the template writes; empty where that is not known."""
    max_tokens: int = 1024
    """Most tokens a turn; FastChat's value."""
    temperature: float | None = None
    """One for all questions; None takes that of the question's category."""
    seed: int = 0
    """Of the sampling."""

    def temperature_of(self, question: Question) -> float:
        """The question's own, else the setting, else its category's."""
        if question.temperature is not None:
            return question.temperature
        if self.temperature is not None:
            return self.temperature
        return TEMPERATURES.get(question.category, _OTHER_TEMPERATURE)


class AnswerSheet:
    """The turns of one model under one set of settings, kept in a store that other sheets may share."""

    def __init__(self, model: str, questions: Sequence[Question], settings: AnswerSettings, store: Store) -> None:
        self.model = model
        self.questions = tuple(questions)
        self.settings = settings
        self._store = store

    @property
    def turns(self) -> int:
        """Most turns of a question."""
        return max(len(question.turns) for question in self.questions)

    def counts(self) -> tuple[int, int]:
        """Turns in all, and those that are answered."""
        return sum(len(q.turns) for q in self.questions), sum(len(self.records(q)) for q in self.questions)

    def missing(self, turn: int) -> list[Question]:
        """The questions that have this turn, all earlier ones answered and this one not."""
        return [q for q in self.questions if len(q.turns) >= turn and len(self.records(q)) == turn - 1]

    def conversation(self, question: Question) -> Conversation:
        """What the model is to read next: its answered turns and the question's next one."""
        return self._conversation(question, self.records(question))

    def put(
        self,
        question: Question,
        text: str,
        *,
        finish_reason: FinishReason,
        prompt_tokens: int | None,
        completion_tokens: int | None,
        prompt_cut: int = 0,
        served_model: str | None = None,
    ) -> None:
        """Stores the answer to the question's next turn."""
        records = self.records(question)
        self._store.append(
            {
                **dict(zip(KEY_FIELDS, self._key(question, records))),
                "text": text.strip(),
                "finish_reason": finish_reason,
                "prompt_tokens": prompt_tokens,
                "prompt_cut": prompt_cut,
                "completion_tokens": completion_tokens,
                "temperature": self.settings.temperature_of(question),
                "served_model": served_model,
                "tstamp": time.time(),
            }
        )

    def records(self, question: Question) -> list[Record]:
        """The question's answered turns, in order."""
        records: list[Record] = []
        while len(records) < len(question.turns):
            record = self._store.get(self._key(question, records))
            if record is None:
                break
            records.append(record)
        return records

    def answers(self) -> list[Answer]:
        """The answers of which every turn is there."""
        done = [(question, self.records(question)) for question in self.questions]
        return [
            Answer(
                question_id=question.id,
                model=self.model,
                turns=tuple(str(record["text"]) for record in records),
                tstamp=float(str(records[-1]["tstamp"])),
            )
            for question, records in done
            if len(records) == len(question.turns)
        ]

    def summary(self) -> dict[str, object]:
        """Settings and counts, for the report: what a reader must know about these answers."""
        records = [record for question in self.questions for record in self.records(question)]
        return {
            "model": self.model,
            **asdict(self.settings),
            "turns": sum(len(question.turns) for question in self.questions),
            "answered": len(records),
            "cut_off": sum(record["finish_reason"] == "length" for record in records),
            "empty": sum(not record["text"] for record in records),
            "prompts_cut": sum(bool(record["prompt_cut"]) for record in records),
            "served_models": sorted({str(r["served_model"]) for r in records if r["served_model"]}),
        }

    def _conversation(self, question: Question, records: Sequence[Record]) -> Conversation:
        messages: list[Mapping[str, str]] = []
        for asked, record in zip(question.turns, records):
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": str(record["text"])})
        return (*messages, {"role": "user", "content": question.turns[len(records)]})

    def _key(self, question: Question, records: Sequence[Record]) -> tuple[int, int, str, str]:
        """The key of the turn that follows `records`."""
        settings = replace(self.settings, temperature=self.settings.temperature_of(question))
        request = digest([asdict(settings), self._conversation(question, records)])
        return question.id, len(records) + 1, self.model, request
