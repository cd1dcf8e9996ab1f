"""Measures how many tasks a model answers rightly: prompts through an engine, completions through the grader.

Knows nothing of files, tables or which engine it is; also meant to be called in training, on a live engine.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import ConfigError, WorkerError
from align_core.text import Tokenizer, load_tokenizer, render_prompt
from align_core.types import Completion, FinishReason, Prompt
from align_eval.accuracy.math import grade
from align_eval.accuracy.tasks import Task
from align_eval.models import running_engine
from align_eval.statistics import wilson

_CHUNK = 256  # prompts handed over at once: enough to keep an engine busy, few enough to show progress


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One task's result, with all that a person needs to check it."""

    line: int
    """Line of the data file."""
    prompt: str
    """The prompt as the model read it, special tokens left out."""
    answer: str
    """The gold answer as the file has it."""
    completion: str
    """What the model wrote."""
    extracted: str
    """What the grader took for its answer."""
    method: str
    """Where the grader found it."""
    correct: bool
    """Right by flexible grading."""
    strict_correct: bool
    """Right by strict grading: only `#### N` counts."""
    tokens: int
    """Tokens of the completion."""
    finish_reason: FinishReason
    """`length` when the completion was cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """The result over all tasks. Bounds are Wilson's, 95 %."""

    n: int
    """Tasks."""
    correct: int
    """Right by flexible grading."""
    accuracy: float
    """correct / n."""
    low: float
    high: float
    strict_correct: int
    """Right by strict grading."""
    strict_accuracy: float
    strict_low: float
    strict_high: float
    unanswered: int
    """Completions in which no answer was found."""
    truncated: int
    """Completions cut off at the token limit."""
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
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Lets the model answer every task once and grades the answers.

    Args:
        sampling: greedy (temperature 0) measures the model's mode; one completion a task.
        context: longest prompt plus completion that the engine takes, tokens; longer prompts are cut from the left.
        progress: called with the number of tasks just finished.

    Raises:
        ConfigError: sampling.n is not 1, or max_tokens leaves no room for a prompt.
        WorkerError: the engine gave up an answer; it is not counted as a wrong one.
    """
    if sampling.n != 1:
        raise ConfigError(f"accuracy takes one completion a task, got sampling.n {sampling.n}")
    room = context - sampling.max_tokens
    if room < 1:
        raise ConfigError(
            f"max_tokens {sampling.max_tokens} leaves no room for a prompt in a context of {context} tokens; "
            "lower max_tokens or raise context"
        )
    begin = time.monotonic()
    prompts = [
        Prompt(id=index, tokens=render_prompt(tokenizer, task.content, template=template, max_tokens=room))
        for index, task in enumerate(tasks)
    ]
    items: list[Item] = []
    for first in range(0, len(tasks), _CHUNK):
        part = slice(first, first + _CHUNK)
        completions = engine.generate(prompts[part], sampling)
        for task, prompt, completion in zip(tasks[part], prompts[part], completions, strict=True):
            items.append(_item(task, prompt, completion, tokenizer))
        if progress is not None:
            progress(len(completions))
    return Evaluation(accuracy=summarise(items, seconds=time.monotonic() - begin), items=items)


def evaluate_model(
    model: Path,
    tasks: Sequence[Task],
    *,
    engine: EngineConfig,
    sampling: SamplingConfig,
    template: str = "auto",
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Starts the engine named in `engine` on `model`, evaluates, and frees the engine whatever happens."""
    tokenizer = load_tokenizer(model)
    with running_engine(model, engine) as live:
        return evaluate(
            live,
            tokenizer,
            tasks,
            sampling=sampling,
            context=engine.context,
            template=template,
            progress=progress,
        )


def summarise(items: Sequence[Item], *, seconds: float) -> Accuracy:
    """Counts and intervals over `items`, of which there is at least one."""
    n = len(items)
    correct = sum(item.correct for item in items)
    strict = sum(item.strict_correct for item in items)
    flexible_bounds, strict_bounds = wilson(correct, n), wilson(strict, n)
    return Accuracy(
        n=n,
        correct=correct,
        accuracy=correct / n,
        low=flexible_bounds.low,
        high=flexible_bounds.high,
        strict_correct=strict,
        strict_accuracy=strict / n,
        strict_low=strict_bounds.low,
        strict_high=strict_bounds.high,
        unanswered=sum(item.method == "none" for item in items),
        truncated=sum(item.finish_reason == "length" for item in items),
        seconds=seconds,
    )


def _item(task: Task, prompt: Prompt, completion: Completion, tokenizer: Tokenizer) -> Item:
    if completion.finish_reason == "abort":
        raise WorkerError(f"the engine gave up the answer to line {task.line} of the data; run again")
    text = tokenizer.decode(completion.tokens)
    verdict = grade(text, task.gold)
    return Item(
        line=task.line,
        prompt=tokenizer.decode(prompt.tokens),
        answer=task.answer,
        completion=text,
        extracted=verdict.extracted,
        method=verdict.method,
        correct=verdict.flexible,
        strict_correct=verdict.strict,
        tokens=len(completion.tokens),
        finish_reason=completion.finish_reason,
    )
