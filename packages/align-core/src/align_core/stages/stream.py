"""A stream of completions from an engine that does not wait for the trainer, with a bound on their staleness.

The staleness of a completion is the number of updates between the weights that sampled its first token and those that
it trains. Before step k the prompts of the steps up to k + S are under way or waiting, never more, and step k takes its
own prompts, waiting for those that have not ended: they were submitted at step k - S, so none is staler than S =
`schedule.max_staleness`, and a long completion has S steps to end before anything waits for it. Each step trains on the
same prompts as it would synchronously, and with S = 0 nothing else differs either.

`engine.in_flight` says what new weights do to completions under way; with `continue` they are partial rollouts, begun
by one version and ended by another. A checkpoint does what new weights would: with `drain` it waits for completions
under way, with `abort` it keeps their prompts only, with `continue` also the tokens that they have, each with its
version, and a continued run goes on from there. Groups are handed to whoever scores them as soon as they are whole.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from align_core.config import PolicyConfig, SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate, SupportsPartial, WeightSink
from align_core.errors import ConfigError, SyncError, WorkerError
from align_core.stages.carried import from_text, to_text
from align_core.stages.rollout import Prompts, Question, Rollout, assemble, training_sampling
from align_core.types import Completion, Prompt

# Keys in a checkpoint's record.
_GROUPS = "schedule.groups"
_ENDED = "schedule.ended"
_BEGUN = "schedule.begun"

Whole = Callable[[Rollout], None]
"""Takes completions that are whole and will be asked for later."""


@dataclass(kw_only=True)
class _Group:
    """The completions of one question that have ended."""

    question: Question
    completions: list[Completion] = field(default_factory=list)


class Stream:
    """Submits, polls and hands out whole groups; also an engine for evaluations, which run between the groups."""

    def __init__(self, config: PolicyConfig, engine: RolloutEngine, prompts: Prompts, whole: Whole) -> None:
        """`whole` is told of each group that has ended; raises ConfigError for an engine that only samples at once."""
        if not isinstance(engine, SupportsAsyncGenerate):
            raise ConfigError(
                f"engine {config.engine.name!r} cannot sample in the background; set schedule.kind to 'sync' or "
                "'one_step_off', or choose another engine"
            )
        self._config, self._prompts, self._whole = config, prompts, whole
        self._sampling = training_sampling(config)
        self._background: SupportsAsyncGenerate = engine
        self._engine: RolloutEngine = engine
        self._admitted = 0
        """Prompt ids below are under way, ended or taken."""
        self._again: list[int] = []
        """Ids of those that were under way at the checkpoint."""
        self._begun: list[Completion] = []
        """What those had."""
        self._groups: dict[int, _Group] = {}
        """By prompt id: under way or ended, and not taken yet."""
        self._aside: dict[int, list[Completion]] = {}
        """Completions of an evaluation."""

    def take(self, step: int) -> Rollout:
        """The batch of step `step`, whose weights the engine holds.

        Raises:
            SyncError: a completion is staler than the bound.
        """
        self._admit(step)
        ids = range(step * self._config.batch_size, (step + 1) * self._config.batch_size)
        while not all(self._ended(id) for id in ids):
            self._receive()
        groups = [self._groups.pop(id) for id in ids]
        completions = [c for group in groups for c in _in_order(group.completions)]
        _check_staleness(completions, oldest=step - self._config.schedule.max_staleness)
        return assemble([group.question for group in groups], completions)

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """Completions of other prompts, which join those under way; see `align_core.contracts.RolloutEngine`.

        Whoever asks numbers prompts as it likes: here they get ids beyond those of training, and keep their seeds.
        """
        first = self._config.steps * self._config.batch_size
        renumbered = [
            replace(prompt, id=first + place, seed_id=prompt.id if prompt.seed_id is None else prompt.seed_id)
            for place, prompt in enumerate(prompts)
        ]
        self._aside = {prompt.id: [] for prompt in renumbered}
        self._background.submit(renumbered, sampling)
        while sum(map(len, self._aside.values())) < len(prompts) * sampling.n:
            self._receive()
        aside, self._aside = self._aside, {}
        answered = zip(prompts, renumbered)
        return [replace(c, prompt_id=own.id) for own, other in answered for c in _in_order(aside[other.id])]

    def weight_sink(self) -> WeightSink:
        """The engine's."""
        return self._engine.weight_sink()

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()

    def look(self) -> None:
        """Takes in what has ended, without waiting."""
        self._sort_out(self._background.poll(0.0))

    def state(self) -> Mapping[str, str]:
        """The completions of the questions that ended; the ids of those that are under way, and what they have."""
        while self._config.engine.in_flight == "drain" and not all(self._ended(id) for id in self._groups):
            self._receive()  # the weights that sample them are not kept
        begun = self._have_begun()
        ended = [group for id, group in self._groups.items() if self._ended(id)]
        under_way = sorted({*self._again, *(id for id in self._groups if not self._ended(id))})
        return {
            _GROUPS: json.dumps({"admitted": self._admitted, "under_way": under_way}),
            _ENDED: to_text([c for group in ended for c in group.completions]),
            _BEGUN: to_text(begun),
        }

    def restore(self, state: Mapping[str, str]) -> None:
        """What had ended is there; what was under way is submitted at the next step, to its weights."""
        if _GROUPS not in state:
            return
        record = json.loads(state[_GROUPS])
        self._admitted, self._again = record["admitted"], list(record["under_way"])
        self._begun = from_text(state[_BEGUN]) if _BEGUN in state else []
        completions = from_text(state[_ENDED])
        ids = list(dict.fromkeys(completion.prompt_id for completion in completions))
        self._groups = {id: _Group(question=question) for id, question in zip(ids, self._questions(ids))}
        self._sort_out(completions)

    def _have_begun(self) -> list[Completion]:
        """Of the groups under way: completions that have ended, and the tokens of those that would go on."""
        engine = self._background
        if self._config.engine.in_flight != "continue" or not isinstance(engine, SupportsPartial):
            self.look()
            return []
        engine.pause()  # so that nothing ends between the two questions
        try:
            self.look()
            partial = engine.partial()
        finally:
            engine.resume()
        waiting = [group for id, group in self._groups.items() if not self._ended(id)]
        whole = [completion for group in waiting for completion in group.completions]
        return [*whole, *(c for c in partial if c.prompt_id in self._groups and len(c.tokens))]

    def _ended(self, id: int) -> bool:
        return len(self._groups[id].completions) == self._sampling.n

    def _admit(self, step: int) -> None:
        last_step = min(step + self._config.schedule.max_staleness, self._config.steps - 1)
        last = (last_step + 1) * self._config.batch_size
        again, self._again, begun, self._begun = self._again, [], self._begun, []
        self._submit(self._questions(again), begun)
        self._submit(self._questions(range(self._admitted, last)))
        self._admitted = max(self._admitted, last)

    def _submit(self, questions: Sequence[Question], begun: Sequence[Completion] = ()) -> None:
        if not questions:
            return
        prompts = [question.prompt for question in questions]
        self._groups |= {question.prompt.id: _Group(question=question) for question in questions}
        if begun and isinstance(self._background, SupportsPartial):
            for completion in begun:
                if completion.finish_reason != "abort":
                    self._groups[completion.prompt_id].completions.append(completion)
            self._background.submit_begun(prompts, self._sampling, begun)
        else:
            self._background.submit(prompts, self._sampling)

    def _questions(self, ids: Iterable[int]) -> list[Question]:
        """The questions of these prompt ids."""
        size = self._config.batch_size
        wanted = list(ids)
        steps = {step: self._prompts.of_step(step) for step in {id // size for id in wanted}}
        return [steps[id // size][id % size] for id in wanted]

    def _receive(self) -> None:
        found = self._background.poll()
        if not found:
            raise WorkerError("the engine has nothing under way, but completions are missing; run the command again")
        self._sort_out(found)

    def _sort_out(self, found: Sequence[Completion]) -> None:
        """Each completion to its group; a group of which one was cut short is sampled again as a whole."""
        for completion in found:
            if completion.prompt_id in self._aside:
                self._aside[completion.prompt_id].append(completion)
                continue
            group = self._groups[completion.prompt_id]
            group.completions.append(completion)
            if not self._ended(completion.prompt_id):
                continue
            if any(one.finish_reason == "abort" for one in group.completions):
                self._submit([group.question])
            else:
                self._whole(assemble([group.question], _in_order(group.completions)))


def _in_order(completions: Iterable[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: completion.sample)


def _check_staleness(completions: Sequence[Completion], *, oldest: int) -> None:
    stale = [c for c in completions if c.version < oldest]
    if stale:
        raise SyncError(
            f"{len(stale)} completions were begun by weights older than version {oldest}, the first of prompt "
            f"{stale[0].prompt_id} by version {stale[0].version}"
        )
