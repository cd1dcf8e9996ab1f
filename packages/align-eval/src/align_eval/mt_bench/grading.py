"""What the judge is asked: the conversations for single grading and for pairs, as FastChat builds them.

Knows nothing of how they are sent or what comes back. `Grading` is one call of the judge.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from align_core.errors import DataError, choices
from align_eval.digest import digest
from align_eval.mt_bench.fastchat import Answer
from align_eval.mt_bench.questions import NEEDS_REFERENCE, Bench, JudgePrompt, Question

Mode = Literal["single", "pair"]
Answers = Mapping[str, Mapping[int, Answer]]
"""Model -> question -> answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grading:
    """One thing to ask the judge: about one answer, or about two of which the first is shown as A."""

    question_id: int
    turn: int
    """1 or 2; 2 shows both turns and asks about the second."""
    models: tuple[str, ...]
    """One model, or (A, B)."""
    sample: int
    """0 .. k-1, how often the same is asked."""
    prompt: JudgePrompt
    user_prompt: str
    """The prompt's template, filled."""
    answer_hash: str
    """Of the judged turns; a changed answer makes another grading."""

    @property
    def mode(self) -> Mode:
        """Single grading or a game of a pair."""
        return "single" if len(self.models) == 1 else "pair"

    @property
    def prompt_hash(self) -> str:
        """Of all that the judge reads: a changed prompt or reference makes another grading."""
        return digest([self.prompt.system, self.user_prompt])

    def messages(self) -> tuple[Mapping[str, str], ...]:
        """The conversation."""
        return ({"role": "system", "content": self.prompt.system}, {"role": "user", "content": self.user_prompt})


def single_gradings(bench: Bench, answers: Answers, *, samples: int = 1) -> list[Grading]:
    """Every answer of every model, each turn, `samples` times: models x 80 x 2 x k."""
    return [
        _grading(bench, question, turn, (answers[model][question.id],), sample)
        for model in answers
        for question in bench.questions
        for turn in range(1, len(question.turns) + 1)
        for sample in range(samples)
    ]


def pair_gradings(bench: Bench, answers: Answers, *, baseline: str | None = None, samples: int = 1) -> list[Grading]:
    """Every pair of models (or each model with the baseline), each turn, both orders: pairs x 80 x 2 x 2 x k.

    Raises:
        DataError: there are no two models, or the baseline has no answers.
    """
    return [
        _grading(bench, question, turn, (answers[a][question.id], answers[b][question.id]), sample)
        for first, second in model_pairs(list(answers), baseline=baseline)
        for a, b in ((first, second), (second, first))
        for question in bench.questions
        for turn in range(1, len(question.turns) + 1)
        for sample in range(samples)
    ]


def model_pairs(models: Sequence[str], *, baseline: str | None = None) -> Iterator[tuple[str, str]]:
    """The pairs (model_1, model_2): all of them, or every other model with the baseline as model_2."""
    if len(models) < 2:
        raise DataError(f"pairs need two models, there is {choices(models)}; answer with another one")
    if baseline is None:
        yield from combinations(models, 2)
        return
    if baseline not in models:
        raise DataError(f"the baseline {baseline!r} has no answers; there are those of {choices(models)}")
    yield from ((model, baseline) for model in models if model != baseline)


def check_answers(bench: Bench, answers: Answers) -> None:
    """Raises DataError unless every model has answered every turn of every question."""
    for model, of_model in answers.items():
        missing = [
            question.id
            for question in bench.questions
            if question.id not in of_model or len(of_model[question.id].turns) < len(question.turns)
        ]
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            raise DataError(
                f"{model!r} lacks answers to {len(missing)} of {len(bench.questions)} questions: {shown}; finish "
                "`align-eval mt-bench answer` first"
            )


def _grading(bench: Bench, question: Question, turn: int, answers: tuple[Answer, ...], sample: int) -> Grading:
    references = bench.references.get(question.id, ()) if question.category in NEEDS_REFERENCE else ()
    with_reference = len(references) >= turn
    name = ("single" if len(answers) == 1 else "pair") + ("-math-v1" if with_reference else _general(len(answers)))
    name += "-multi-turn" if turn > 1 else ""
    if name not in bench.prompts:
        raise DataError(f"the judge prompts lack {name!r}; there are {choices(bench.prompts)}")
    prompt = bench.prompts[name]
    fields = _fields(question, turn, answers, references if with_reference else ())
    try:
        user_prompt = prompt.template.format(**fields)
    except (LookupError, ValueError) as error:
        raise DataError(f"the judge prompt {name!r} does not fit: {error!r}; it may use {choices(fields)}") from error
    return Grading(
        question_id=question.id,
        turn=turn,
        models=tuple(answer.model for answer in answers),
        sample=sample,
        prompt=prompt,
        user_prompt=user_prompt,
        answer_hash=digest([answer.turns[:turn] for answer in answers]),
    )


def _general(answers: int) -> str:
    return "-v1" if answers == 1 else "-v2"


def _fields(question: Question, turn: int, answers: tuple[Answer, ...], references: tuple[str, ...]) -> dict[str, str]:
    """The fields of a template: numbered ones in the prompts about two turns, plain ones about one."""
    fields = {f"ref_answer_{number}": text for number, text in enumerate(references, start=1)}
    if turn == 1:
        fields["question"] = question.turns[0]
        names = ("answer",) if len(answers) == 1 else ("answer_a", "answer_b")
        return {**fields, **{name: answer.turns[0] for name, answer in zip(names, answers)}}
    for number in range(1, turn + 1):
        fields[f"question_{number}"] = question.turns[number - 1]
        names = (f"answer_{number}",) if len(answers) == 1 else (f"answer_a_{number}", f"answer_b_{number}")
        fields.update({name: answer.turns[number - 1] for name, answer in zip(names, answers)})
    return fields
