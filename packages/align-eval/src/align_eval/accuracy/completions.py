"""Completions of tasks, through a live engine, kept so that an interrupted evaluation continues.

Completions are stored, not verdicts: a better grader needs no new generation. Knows nothing of grading.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from align_core.config import SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.errors import ConfigError, WorkerError
from align_core.text import Tokenizer, render_prompt
from align_core.types import Completion, FinishReason, Prompt
from align_eval.accuracy.tasks import Task
from align_eval.digest import digest
from align_eval.store import Store

KEY_FIELDS = ("line", "sample", "request_hash")
"""What identifies a completion: the task, which of its samples, and all that shapes it."""
_CHUNK = 256  # completions asked for at once: enough to keep an engine busy, few enough to lose little


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """One completion of one task."""

    task: Task
    sample: int
    prompt: str
    """The prompt as the model read it, special tokens left out."""
    completion: str
    tokens: int
    """Tokens of the completion."""
    finish_reason: FinishReason
    """`length` when the completion was cut off."""


def complete(
    engine: Callable[[], RolloutEngine],
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    *,
    sampling: SamplingConfig,
    context: int,
    template: str,
    source: str = "",
    store: Store | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Answered]:
    """`sampling.n` completions a task, in the order of tasks and samples.

    Args:
        engine: gives the engine; called only if something has to be generated.
        context: longest prompt plus completion that the engine takes, tokens; longer prompts are cut from the left.
        source: a fingerprint of the model; completions of another one are not taken from the store.
        store: where completions are kept; without one, they are all made anew.
        progress: called with the number of tasks just finished.

    Raises:
        ConfigError: max_tokens leaves no room for a prompt.
        WorkerError: the engine gave up a completion; it is not counted as a wrong one.
    """
    prompts = _render(tokenizer, tasks, context=context, max_tokens=sampling.max_tokens, template=template)
    # The prompt's id seeds its sampling, so it is part of the request.
    hashes = [digest([source, asdict(sampling), prompt.id, prompt.tokens.tolist()]) for prompt in prompts]
    kept: dict[tuple[int, int], Answered] = {}
    missing: list[Prompt] = []
    for prompt, task, request in zip(prompts, tasks, hashes):
        found = _stored(store, task, request, sampling.n, tokenizer.decode(prompt.tokens))
        kept.update({(prompt.id, answered.sample): answered for answered in found})
        if not found:
            missing.append(prompt)
    progress(len(tasks) - len(missing))
    at_once = max(1, _CHUNK // sampling.n)
    for first in range(0, len(missing), at_once):
        part = missing[first : first + at_once]
        for completion in engine().generate(part, sampling):
            index = completion.prompt_id
            answered = _answered(tasks[index], tokenizer.decode(prompts[index].tokens), completion, tokenizer)
            kept[index, completion.sample] = answered
            _keep(store, answered, hashes[index])
        progress(len(part))
    return [kept[index, sample] for index in range(len(tasks)) for sample in range(sampling.n)]


def _render(
    tokenizer: Tokenizer, tasks: Sequence[Task], *, context: int, max_tokens: int, template: str
) -> list[Prompt]:
    """The prompts, numbered by their tasks."""
    room = context - max_tokens
    if room < 1:
        raise ConfigError(
            f"max_tokens {max_tokens} leaves no room for a prompt in a context of {context} tokens; "
            "lower max_tokens or raise context"
        )
    return [
        Prompt(id=index, tokens=render_prompt(tokenizer, task.content, template=template, max_tokens=room))
        for index, task in enumerate(tasks)
    ]


def _answered(task: Task, prompt: str, completion: Completion, tokenizer: Tokenizer) -> Answered:
    if completion.finish_reason == "abort":
        raise WorkerError(f"the engine gave up the answer to line {task.line} of the data; run again")
    return Answered(
        task=task,
        sample=completion.sample,
        prompt=prompt,
        completion=tokenizer.decode(completion.tokens),
        tokens=len(completion.tokens),
        finish_reason=completion.finish_reason,
    )


def _stored(store: Store | None, task: Task, request: str, samples: int, prompt: str) -> list[Answered]:
    """All samples of a task, or none of them if the store lacks one."""
    if store is None:
        return []
    found: list[Answered] = []
    for sample in range(samples):
        record = store.get((task.line, sample, request))
        if record is None:
            return []
        reason: FinishReason = "length" if record["finish_reason"] == "length" else "stop"
        found.append(
            Answered(
                task=task,
                sample=sample,
                prompt=prompt,
                completion=str(record["completion"]),
                tokens=int(str(record["tokens"])),
                finish_reason=reason,
            )
        )
    return found


def _keep(store: Store | None, answered: Answered, request: str) -> None:
    if store is None or (answered.task.line, answered.sample, request) in store:
        return
    store.append(
        {
            "line": answered.task.line,
            "sample": answered.sample,
            "request_hash": request,
            "completion": answered.completion,
            "tokens": answered.tokens,
            "finish_reason": answered.finish_reason,
            "tstamp": time.time(),
        }
    )
