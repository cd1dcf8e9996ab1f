"""Measures how many tasks a model answers rightly: completions of an engine, graded, counted, with intervals.

Knows nothing of files, tables or which engine it is; `evaluate` is also meant to be called in training, on a live
engine.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import ConfigError
from align_core.fingerprint import fingerprint
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import FinishReason
from align_eval.accuracy.completions import Answered, complete
from align_eval.accuracy.tasks import Task
from align_eval.accuracy.verdict import Verdict
from align_eval.accuracy.verifiers import NumberVerifier, Verifier
from align_eval.models import running_engine
from align_eval.statistics import Interval, cluster_bootstrap, pass_at_k, wilson
from align_eval.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One completion's result, with all that a person needs to check it."""

    line: int
    """Line of the data file."""
    sample: int
    """Which of the task's completions, from 0."""
    prompt: str
    """The prompt as the model read it, special tokens left out."""
    answer: str
    """The right answer."""
    completion: str
    """What the model wrote."""
    extracted: str
    """What the grader took for its answer."""
    method: str
    """Where the grader found it."""
    correct: bool
    """Right by flexible grading."""
    strict_correct: bool
    """Right by strict grading: the answer is where the task wants it."""
    note: str
    """What the grader says about its verdict, usually nothing."""
    tokens: int
    """Tokens of the completion."""
    finish_reason: FinishReason
    """`length` when the completion was cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A share between 0 and 1 with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The result over all tasks. 95 % bounds: Wilson's for one completion a task, else a bootstrap over tasks."""

    n: int
    """Tasks."""
    samples: int
    """Completions a task."""
    correct: int
    """Completions right by flexible grading."""
    accuracy: float
    """correct / (n samples): the accuracy, and with several samples mean@k."""
    low: float
    high: float
    strict_correct: int
    """Completions right by strict grading."""
    strict_accuracy: float
    strict_low: float
    strict_high: float
    pass_at: dict[int, Share]
    """k -> pass@k by flexible grading, k = 1, 2, 4 ... samples; empty for one completion a task."""
    unanswered: int
    """Completions in which no answer was found."""
    truncated: int
    """Completions cut off at the token limit."""
    mean_tokens: float
    """Of a completion."""
    seconds: float
    """Wall time of generation and grading."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A summary and the items behind it."""

    accuracy: Accuracy
    items: list[Item]


def evaluate(
    engine: RolloutEngine,
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    sampling: SamplingConfig,
    context: int,
    template: str = "auto",
    verifier: Verifier | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """Lets a live engine answer every task `sampling.n` times and grades the answers.

    Args:
        sampling: greedy (temperature 0) measures the model's mode; several samples give mean@k and pass@k.
        context: longest prompt plus completion that the engine takes, tokens; longer prompts are cut from the left.
        verifier: left out, answers are numbers as in GSM8K. Entered for the grading, and left after it.
        progress: called with the number of tasks just finished.

    Raises:
        ConfigError: max_tokens leaves no room for a prompt.
        WorkerError: the engine gave up an answer; it is not counted as a wrong one.
    """
    begin = time.monotonic()
    answered = complete(
        lambda: engine, tokenizer, tasks, sampling=sampling, context=context, template=template, progress=progress
    )
    return grade_all(answered, verifier or NumberVerifier(), samples=sampling.n, begin=begin)


def evaluate_model(
    model: Path,
    tasks: Sequence[Task],
    *,
    engine: EngineConfig,
    sampling: SamplingConfig,
    template: str = "auto",
    verifier: Verifier | None = None,
    store: Store | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Evaluation:
    """`evaluate` on a model directory: the engine named in `engine` is started if the store lacks a completion."""
    begin = time.monotonic()
    tokenizer = load_tokenizer(model)
    with ExitStack() as stack:

        @cache
        def live() -> RolloutEngine:
            return stack.enter_context(running_engine(model, engine))

        answered = complete(
            live,
            tokenizer,
            tasks,
            sampling=sampling,
            context=engine.context,
            template=template,
            source=f"{fingerprint(model)} {engine.dtype}" if store is not None else "",
            store=store,
            progress=progress,
        )
    return grade_all(answered, verifier or NumberVerifier(), samples=sampling.n, begin=begin)


def grade_all(answered: Sequence[Answered], verifier: Verifier, *, samples: int, begin: float) -> Evaluation:
    """Grades completions; `begin` is when their making began, by the monotonic clock."""
    with verifier as grader:
        verdicts = grader.grade(
            [a.prompt for a in answered], [a.completion for a in answered], [a.task.record for a in answered]
        )
    items = [_item(one, verdict) for one, verdict in zip(answered, verdicts, strict=True)]
    return Evaluation(accuracy=summarise(items, samples=samples, seconds=time.monotonic() - begin), items=items)


def summarise(items: Sequence[Item], *, samples: int, seconds: float) -> Accuracy:
    """Counts and intervals over `items`, the completions of a task next to each other, at least one task."""
    if not items or len(items) % samples:
        raise ConfigError(f"{len(items)} completions are not {samples} for each of at least one task")
    flexible = _by_task([item.correct for item in items], samples)
    strict = _by_task([item.strict_correct for item in items], samples)
    interval, strict_interval = _interval(flexible, samples), _interval(strict, samples)
    return Accuracy(
        n=len(flexible),
        samples=samples,
        correct=sum(flexible),
        accuracy=sum(flexible) / len(items),
        low=interval.low,
        high=interval.high,
        strict_correct=sum(strict),
        strict_accuracy=sum(strict) / len(items),
        strict_low=strict_interval.low,
        strict_high=strict_interval.high,
        pass_at={k: _pass_at(flexible, samples, k) for k in _ks(samples)},
        unanswered=sum(item.method == "none" for item in items),
        truncated=sum(item.finish_reason == "length" for item in items),
        mean_tokens=sum(item.tokens for item in items) / len(items),
        seconds=seconds,
    )


def _by_task(right: Sequence[bool], samples: int) -> list[int]:
    """Right completions of each task."""
    return [sum(right[first : first + samples]) for first in range(0, len(right), samples)]


def _interval(right: Sequence[int], samples: int) -> Interval:
    if samples == 1:
        return wilson(sum(right), len(right))
    return cluster_bootstrap(right, [samples] * len(right))


def _ks(samples: int) -> list[int]:
    """1, 2, 4 ... and `samples`; none for one completion a task."""
    powers = [2**power for power in range(samples.bit_length()) if 2**power < samples]
    return [*powers, samples] if samples > 1 else []


def _pass_at(right: Sequence[int], samples: int, k: int) -> Share:
    values = [pass_at_k(samples, correct, k) for correct in right]
    low, high = cluster_bootstrap(values, [1] * len(values))
    return Share(value=sum(values) / len(values), low=low, high=high)


def _item(answered: Answered, verdict: Verdict) -> Item:
    return Item(
        line=answered.task.line,
        sample=answered.sample,
        prompt=answered.prompt,
        answer=answered.task.gold,
        completion=answered.completion,
        extracted=verdict.extracted,
        method=verdict.method,
        correct=verdict.flexible,
        strict_correct=verdict.strict,
        note=verdict.note,
        tokens=answered.tokens,
        finish_reason=answered.finish_reason,
    )
