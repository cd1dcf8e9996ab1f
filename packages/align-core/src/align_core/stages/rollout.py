"""From prompts to completions: what a stage asks of the engine, and the batch that the answers become.

Every sampling stage uses these pieces in the same order: `synchronise`, `ask`, `collect`, then scores and updates of
its own. Knows nothing about rewards, losses and processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from align_core.config import PolicyConfig, SamplingConfig
from align_core.contracts import RolloutEngine
from align_core.data.dataset import Dataset, each_encoded, record_and_encoded
from align_core.data.examples import prompt_example
from align_core.data.records import PromptRecord, read_prompts
from align_core.data.tally import Tally, tally
from align_core.errors import DataError, WorkerError
from align_core.stages.directory import Fingerprinted
from align_core.stages.evaluations import Evaluations
from align_core.stages.preflight import open_tokenizer
from align_core.stages.sync import check_versions
from align_core.text import RenderedPrompt, Tokenizer, fit_prompt
from align_core.types import Batch, Completion, Prompt


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt as the engine sees it, and the record that it was made of."""

    prompt: Prompt
    record: PromptRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Completions of some questions, the samples of a question adjacent."""

    questions: Sequence[Question]
    """One a completion: a question repeats for each of its samples."""
    completions: Sequence[Completion]
    batch: Batch
    """Prompt and completion of each, with the columns of `rollout_batch`."""

    def select(self, rows: NDArray[np.int64]) -> "Rollout":
        """The completions `rows`, in that order."""
        return Rollout(
            questions=[self.questions[i] for i in rows],
            completions=[self.completions[i] for i in rows],
            batch=self.batch.select(rows),
        )


class Prompts:
    """The stage's prompts and held-out prompts, opened and checked before anything starts."""

    def __init__(self, config: PolicyConfig) -> None:
        """Raises DataError for a bad file or no room for a prompt beside `sampling.max_tokens`, ConfigError for an
        evaluation that there is not."""
        self.tokenizer = open_tokenizer(config)
        self._encode = partial(_encode, tokenizer=self.tokenizer, template=config.template, max_tokens=_room(config))
        self.evaluations = Evaluations(config, self.tokenizer)
        self._size = config.batch_size
        self._first_held_out = config.steps * config.batch_size
        self.records = read_prompts(config.data)
        self.held_out = read_prompts(config.eval_data) if config.eval_data else None
        self._order = self.records.order(batch_size=config.batch_size, seed=config.seed)
        self.tally = self._counted(self.records)
        self.held_out_tally = self._counted(self.held_out) if self.held_out else None

    @property
    def data(self) -> dict[str, Fingerprinted]:
        """What a continued run must find again."""
        found: dict[str, Fingerprinted] = {"data": self.records}
        return found | ({"eval_data": self.held_out} if self.held_out else {})

    def of_step(self, step: int) -> list[Question]:
        """The questions of one step; their prompt ids occur in no other step."""
        return self._questions(self.records, self._order(step).tolist(), first_id=step * self._size)

    def for_evaluation(self) -> list[Question]:
        """The held-out questions, with ids beyond those of all training prompts."""
        if self.held_out is None:
            return []
        return self._questions(self.held_out, range(len(self.held_out)), first_id=self._first_held_out)

    def _counted(self, records: Dataset[PromptRecord]) -> Tally:
        examples = map(prompt_example, each_encoded(records, self._encode))
        return tally(([example] for example in examples), whole=len(records))

    def _questions(self, source: Dataset[PromptRecord], indices: Sequence[int], *, first_id: int) -> list[Question]:
        found = [record_and_encoded(source, i, self._encode) for i in indices]
        return [
            Question(prompt=Prompt(id=first_id + k, tokens=rendered.tokens), record=record)
            for k, (record, rendered) in enumerate(found)
        ]


def training_sampling(config: PolicyConfig) -> SamplingConfig:
    """How training samples: the stage's seed enters."""
    return replace(config.sampling, seed=config.sampling.seed + config.seed)


def greedy_sampling(config: PolicyConfig) -> SamplingConfig:
    """How an evaluation samples: the likeliest answer, once."""
    return replace(training_sampling(config), n=1, temperature=0.0)


def collect(engine: RolloutEngine, questions: Sequence[Question], *, sampling: SamplingConfig, version: int) -> Rollout:
    """Samples `sampling.n` completions a question with the weights `version`.

    Raises:
        SyncError: other weights sampled a completion.
    """
    completions = engine.generate([question.prompt for question in questions], sampling)
    check_versions(completions, version=version)
    return assemble(questions, completions)


def assemble(questions: Sequence[Question], completions: Sequence[Completion]) -> Rollout:
    """The rollout that completions of these questions make, whatever their order."""
    by_id = {question.prompt.id: question for question in questions}
    given_up = [completion.prompt_id for completion in completions if completion.finish_reason == "abort"]
    if given_up:
        raise WorkerError(f"the engine gave up {len(given_up)} completions, the first of prompt {given_up[0]}")
    asked = [by_id[completion.prompt_id] for completion in completions]
    batch = rollout_batch([question.prompt for question in questions], completions)
    return Rollout(questions=asked, completions=completions, batch=batch)


def rollout_batch(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Batch:
    """Prompt and completion of every sample end to end: `mask` and `engine_logprobs` on the sampled tokens, `group`."""
    by_id = {prompt.id: prompt.tokens for prompt in prompts}
    heads = [by_id[c.prompt_id] for c in completions]
    return Batch.of(
        [np.concatenate([head, c.tokens]) for head, c in zip(heads, completions)],
        tokens={
            "mask": [np.arange(len(head) + len(c.tokens)) >= len(head) for head, c in zip(heads, completions)],
            "engine_logprobs": [
                np.concatenate([np.zeros(len(head), np.float32), c.logprobs]) for head, c in zip(heads, completions)
            ],
        },
        columns={"group": np.asarray([c.prompt_id for c in completions], dtype=np.int64)},
    )


def _encode(record: PromptRecord, *, tokenizer: Tokenizer, template: str, max_tokens: int) -> RenderedPrompt:
    return fit_prompt(tokenizer, record.prompt, template=template, max_tokens=max_tokens)


def _room(config: PolicyConfig) -> int:
    """Most tokens of a prompt."""
    room = min(config.max_length, config.engine.context) - config.sampling.max_tokens
    if room < 1:
        raise DataError(
            f"sampling.max_tokens {config.sampling.max_tokens} leaves no room for a prompt in the shorter of "
            f"max_length {config.max_length} and engine.context {config.engine.context}; lower it"
        )
    return room
