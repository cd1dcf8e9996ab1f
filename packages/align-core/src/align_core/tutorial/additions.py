"""The task of the tiny tutorial: additions of two small numbers, taught by a careless student and then corrected.

A tiny model learns it in minutes and a person judges it at a glance. The demonstrations come from a student who, when
the units overflow, forgets to carry more often than not (27 + 58 = 75): after supervised training the model's most
likely answer to such a question is the careless one, while the right one stays well within its distribution. Rewards
and preferences then favour the right answer, and greedy accuracy shows what each algorithm learned.

Questions with the same unordered pair of numbers ("27 + 58", "58 + 27") are always on the same side of the split, so
no held-out answer was ever seen. This file knows nothing about models, tokenizers and prompt templates: `prompt` is
the bare question.
"""

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_core.atomic import new_directory
from align_core.data.marks import marked_rows
from align_core.errors import DataError

SMALLEST, LARGEST = 10, 99  # summands and sums have two digits, so that a tiny model soon learns which digit is which
_SLIPS = (1, 2, 3, 5, 10, 10, 20)  # distances of the near misses


@dataclass(frozen=True, kw_only=True, slots=True)
class Addition:
    """One question with its right answer and the answer of someone who mistreats the carry."""

    a: int
    b: int

    @property
    def question(self) -> str:
        """The bare question, without prompt template."""
        return f"What is {self.a} + {self.b}?"

    @property
    def answer(self) -> int:
        """The right answer."""
        return self.a + self.b

    @property
    def carries(self) -> bool:
        """True where the units overflow into the tens: 27 + 58 does, 21 + 58 does not."""
        return self.a % 10 + self.b % 10 >= 10

    @property
    def careless(self) -> int:
        """Ten too few where a carry is due, the right answer elsewhere."""
        return self.answer - 10 if self.carries else self.answer


@dataclass(frozen=True, kw_only=True, slots=True)
class AdditionsFiles:
    """Where `write_additions` put the files; JSON lines, in the formats that `align data` documents."""

    sft: Path
    """Demonstrations `{"prompt", "response"}` of the careless student."""
    preferences: Path
    """Pairs `{"prompt", "chosen", "rejected"}` for DPO: right against wrong."""
    ratings: Path
    """`{"prompt", "response": [...], "score": [...]}` for the reward model: the right answer and three wrong ones."""
    prompts: Path
    """`{"prompt", "answer"}` for reinforcement learning."""
    test: Path
    """Held-out `{"prompt", "answer"}`: no number pair of the other files, in either order."""
    test_preferences: Path
    """Pairs on held-out questions, for the accuracy of the reward model."""


def split(*, seed: int, held_out: float) -> tuple[list[Addition], list[Addition]]:
    """All additions, shuffled and divided by unordered pair: (train, held out).

    Args:
        held_out: share of the unordered pairs that is kept out of training, in (0, 1).
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out}; it is the share of questions kept from training, between 0 and 1")
    rng = random.Random(f"split {seed}")
    pairs = [(a, b) for a in range(SMALLEST, LARGEST) for b in range(a, LARGEST - a + 1)]
    rng.shuffle(pairs)
    cut = round(held_out * len(pairs))
    return _both_orders(pairs[cut:], rng), _both_orders(pairs[:cut], rng)


def _both_orders(pairs: Sequence[tuple[int, int]], rng: random.Random) -> list[Addition]:
    ordered = [Addition(a=a, b=b) for a, b in pairs] + [Addition(a=b, b=a) for a, b in pairs if a != b]
    rng.shuffle(ordered)
    return ordered


def write_additions(
    out: Path,
    *,
    seed: int,
    demonstrations_per_question: int = 6,
    pairs_per_question: int = 3,
    correct: float = 0.35,
    held_out: float = 0.12,
    num_test: int = 200,
) -> AdditionsFiles:
    """Write the six files of the task into the directory `out`, all or nothing; the same seed gives the same bytes.

    Args:
        demonstrations_per_question: how often the careless student answers each training question. As the answers
            differ, the model learns their probabilities and not the answer given once.
        pairs_per_question: preferences, and ratings, of each training question; the mistakes differ.
        correct: probability that the student carries where a carry is due; below one half, so that being careless is
            the most likely answer, and far enough from zero that sampling finds the right one.
        held_out: share of the number pairs kept out of training.
        num_test: held-out questions that are written, half of them with a carry.

    Raises:
        DataError: `out` exists already and is not an empty directory, or fewer than `num_test` questions are held out.
    """
    train, unseen = split(seed=seed, held_out=held_out)
    test = _balanced(unseen, num_test)
    rng = random.Random(f"answers {seed}")
    asked, judged = train * demonstrations_per_question, train * pairs_per_question
    with new_directory(out) as staging:
        _write_lines(staging / "sft.jsonl", demonstrations(asked, correct=correct, rng=rng))
        pairs = list(preference_pairs(judged, rng=rng))
        _write_lines(staging / "preferences.jsonl", pairs)
        _write_lines(staging / "marked.jsonl", marked_rows(pairs))
        _write_lines(staging / "ratings.jsonl", rated_answers(judged, rng=rng))
        _write_lines(staging / "prompts.jsonl", problems(train))
        _write_lines(staging / "test.jsonl", problems(test))
        test_pairs = list(preference_pairs(test, rng=rng))
        _write_lines(staging / "test_preferences.jsonl", test_pairs)
        _write_lines(staging / "test_marked.jsonl", marked_rows(test_pairs))
    return additions_files(out)


def additions_files(out: Path) -> AdditionsFiles:
    """The files that `write_additions` left in `out`."""
    return AdditionsFiles(
        sft=out / "sft.jsonl",
        preferences=out / "preferences.jsonl",
        ratings=out / "ratings.jsonl",
        prompts=out / "prompts.jsonl",
        test=out / "test.jsonl",
        test_preferences=out / "test_preferences.jsonl",
    )


def _balanced(questions: Sequence[Addition], number: int) -> list[Addition]:
    """`number` questions, every second one with a carry."""
    halves = [[q for q in questions if q.carries], [q for q in questions if not q.carries]]
    if min(map(len, halves)) < (number + 1) // 2:
        raise DataError(
            f"{number} test questions, half of them with a carry, asked of {len(questions)} held-out ones, of which "
            f"{len(halves[0])} carry; lower num_test or raise held_out"
        )
    return [halves[i % 2][i // 2] for i in range(number)]


def _write_lines(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def demonstrations(questions: Sequence[Addition], *, correct: float, rng: random.Random) -> Iterator[dict[str, str]]:
    """What the careless student answers; where a carry is due, rightly with probability `correct`."""
    for question in questions:
        answer = question.answer if rng.random() < correct else question.careless
        yield {"prompt": question.question, "response": f" {answer}"}


def preference_pairs(questions: Sequence[Addition], *, rng: random.Random) -> Iterator[dict[str, str]]:
    """The right answer against a wrong one."""
    for question in questions:
        wrong = mistake(question, rng=rng)
        yield {"prompt": question.question, "chosen": f" {question.answer}", "rejected": f" {wrong}"}


def rated_answers(questions: Sequence[Addition], *, rng: random.Random) -> Iterator[dict[str, object]]:
    """The right answer, ten off, and two more mistakes; the score is minus the distance to the right answer.

    Scores let a reward model learn six comparisons from four answers, gross ones first. Told only right from wrong, it
    needs far longer; and against careless answers alone it would learn how those look, not what is right.
    """
    for question in questions:
        answers = [question.answer, ten_off(question)]
        while len(answers) < 4:
            wrong = mistake(question, rng=rng)
            if wrong not in answers:
                answers.append(wrong)
        yield {
            "prompt": question.question,
            "response": [f" {answer}" for answer in answers],
            "score": [-abs(answer - question.answer) for answer in answers],
        }


def ten_off(question: Addition) -> int:
    """The answer with the carry mistaken: forgotten where one is due, else made up (if that leaves two digits)."""
    forgotten = question.carries or question.answer + 10 > LARGEST
    return question.answer - 10 if forgotten else question.answer + 10


def mistake(question: Addition, *, rng: random.Random) -> int:
    """A wrong answer of two digits: ten off (2 in 5), a near miss (about 1 in 4), or any number."""
    kind = rng.choices(("ten off", "near", "any"), weights=(0.4, 0.24, 0.36))[0]
    if kind == "ten off":
        return ten_off(question)
    while True:
        near = question.answer + rng.choice((-1, 1)) * rng.choice(_SLIPS)
        wrong = near if kind == "near" else rng.randint(SMALLEST, LARGEST)
        if wrong != question.answer and SMALLEST <= wrong <= LARGEST:
            return wrong


def problems(questions: Sequence[Addition]) -> Iterator[dict[str, str]]:
    """Questions with their right answers, for verifiable rewards and for evaluation."""
    for question in questions:
        yield {"prompt": question.question, "answer": str(question.answer)}


def corpus() -> Iterator[str]:
    """Lines to train a tokenizer on: every question and answer, and the words of the prompt template."""
    for a in range(SMALLEST, LARGEST):
        for b in range(SMALLEST, LARGEST - a + 1):
            addition = Addition(a=a, b=b)
            yield f":Human: {addition.question}"  # no space before the word, as behind the template's newlines
            yield f":Assistant: {addition.answer}"
