"""When completions are sampled and with which weights: before each update, one update ahead, or all the time.

`sync`          send the weights of now, sample, train: nothing overlaps, everything is on policy.
`one_step_off`  while step k trains, the engine samples step k + 1 with the weights from before that update.
`async`         the engine never stops; see `align_core.stages.stream`.

A stage asks for the rollout of a step and need not know which. The version of weights is the number of steps done.
Knows nothing about policies, rewards and losses: `send` is the caller's way to give the engine new weights.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread
from typing import Protocol

from align_core.config import PolicyConfig
from align_core.contracts import RolloutEngine
from align_core.stages.carried import from_text, to_text
from align_core.stages.clock import Clock
from align_core.stages.rollout import Prompts, Rollout, assemble, collect, training_sampling
from align_core.stages.stream import Stream, Whole

Send = Callable[[RolloutEngine], None]
"""Gives the engine that it is called with the weights of the step, and evaluates them where that is due."""

_AHEAD = "schedule.ahead"  # key in a checkpoint's record


class Schedule(Protocol):
    """Where a step's completions come from; a `Stateful` of the run."""

    def rollout(self, step: int, send: Send, clock: Clock) -> Rollout:
        """The completions that step `step` trains on; calls `send` once on the way."""
        ...

    def state(self) -> Mapping[str, str]:
        """What is sampled but not trained on."""
        ...

    def restore(self, state: Mapping[str, str]) -> None:
        """Continues from `state`."""
        ...


def open_schedule(
    config: PolicyConfig, engine: RolloutEngine, prompts: Prompts, whole: Whole = lambda rollout: None
) -> Schedule:
    """The schedule that `config.schedule` names.

    Args:
        whole: is told of completions that have ended before a step asks for them, so that their scoring may begin.
    """
    kinds: Mapping[str, Callable[[PolicyConfig, RolloutEngine, Prompts, Whole], Schedule]] = {
        "sync": Synchronous,
        "one_step_off": OneStepOff,
        "async": Continuous,
    }
    return kinds[config.schedule.kind](config, engine, prompts, whole)


class Synchronous:
    """Weights, then completions."""

    def __init__(self, config: PolicyConfig, engine: RolloutEngine, prompts: Prompts, whole: Whole) -> None:
        self._config, self._engine, self._prompts, self._whole = config, engine, prompts, whole
        self._sampling = training_sampling(config)

    def rollout(self, step: int, send: Send, clock: Clock) -> Rollout:
        """See `Schedule`."""
        send(self._engine)
        rollout = self._collect(step, version=step)
        clock.lap("generate")
        return rollout

    def state(self) -> Mapping[str, str]:
        """Nothing waits between steps."""
        return {}

    def restore(self, state: Mapping[str, str]) -> None:
        """Nothing to restore."""

    def _collect(self, step: int, version: int) -> Rollout:
        return collect(self._engine, self._prompts.of_step(step), sampling=self._sampling, version=version)


class OneStepOff(Synchronous):
    """A thread waits for the engine while the caller trains."""

    _ahead: Future[Rollout] | None = None

    def rollout(self, step: int, send: Send, clock: Clock) -> Rollout:
        """The completions sampled during the step before; those of the first step, and of none other, are fresh."""
        ready = self._ahead.result() if self._ahead else None
        clock.lap("generate")
        send(self._engine)
        if ready is None:
            ready = self._collect(step, version=step)
            clock.lap("generate")
        self._ahead = None
        if step + 1 < self._config.steps:
            self._ahead = _in_background(lambda: self._collect_ahead(step))
        return ready

    def _collect_ahead(self, step: int) -> Rollout:
        rollout = self._collect(step + 1, version=step)
        self._whole(rollout)
        return rollout

    def state(self) -> Mapping[str, str]:
        """Waits for what is being sampled: the weights that sample it are not kept."""
        return {_AHEAD: to_text(self._ahead.result().completions)} if self._ahead else {}

    def restore(self, state: Mapping[str, str]) -> None:
        """The completions of the next step are there already."""
        if _AHEAD in state:
            completions = from_text(state[_AHEAD])
            step = completions[0].prompt_id // self._config.batch_size
            self._ahead = Future()
            rollout = assemble(self._prompts.of_step(step), completions)
            self._whole(rollout)
            self._ahead.set_result(rollout)


class Continuous:
    """Completions from a stream that goes on while the weights change."""

    def __init__(self, config: PolicyConfig, engine: RolloutEngine, prompts: Prompts, whole: Whole) -> None:
        self._stream = Stream(config, engine, prompts, whole)
        self.state, self.restore = self._stream.state, self._stream.restore

    def rollout(self, step: int, send: Send, clock: Clock) -> Rollout:
        """See `Schedule`."""
        self._stream.look()  # what ended during the update before is scored while the weights are on their way
        send(self._stream)
        rollout = self._stream.take(step)
        clock.lap("generate")
        return rollout


def _in_background(work: Callable[[], Rollout]) -> Future[Rollout]:
    """In a thread that no one waits for when the run ends in an error: the engine may be slow, or dead."""
    future: Future[Rollout] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="align-rollout", daemon=True).start()
    return future
