"""Scores a rollout: each reward of the stage with its weight, what it read out of the replies, and what failed.

A reward model runs beside the policy; functions run in processes of their own (`align_core.rewards.pool`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from align_core.config import PolicyConfig, TrainerConfig
from align_core.errors import DataError
from align_core.rewards.pool import RewardPool
from align_core.rewards.sources import Weighted, parse_rewards, resolve, scores_of
from align_core.stages.preflight import reward_names
from align_core.stages.rollout import Question, Rollout
from align_core.stages.world import World
from align_core.text import Tokenizer, as_text
from align_core.types import Completion, Score

logger = logging.getLogger(__name__)

Source = Callable[[Rollout], Sequence[Score]]
"""One score or reason a completion."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """A completion that could not be scored."""

    question: Question
    completion: Completion
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A rollout with its rewards; completions that could not be scored are no longer in it."""

    rollout: Rollout
    rewards: NDArray[np.float32]
    """float32 [B], the weighted sum."""
    parts: Mapping[str, NDArray[np.float32]]
    """Each reward alone, unweighted, float32 [B]."""
    extracted: Sequence[str]
    """What the rewards read out of each reply."""
    failures: Sequence[Failure]
    """Completions left out because they could not be scored."""


class Rewards:
    """All rewards of a stage: of training, and of its evaluations."""

    def __init__(self, config: PolicyConfig, world: World, tokenizer: Tokenizer) -> None:
        """Loads the reward model and starts the processes, for settings that `preflight.check_rewards` has passed.

        Raises:
            ConfigError: a function of the user's cannot be loaded.
        """
        self._config, self._tokenizer = config, tokenizer
        self._training = parse_rewards(config.reward)
        self._evaluation = parse_rewards(config.eval_reward) if config.eval_reward else self._training
        names = reward_names(config)
        self._pools: dict[str, RewardPool] = {}
        self._early = ThreadPoolExecutor(max(1, config.scoring.workers), thread_name_prefix="align-score")
        self._ahead: dict[tuple[str, int, int], tuple[Future[list[Score]], int]] = {}
        """By reward, prompt id and sample: scores on their way, and which of them."""
        try:
            self._sources = {name: self._source(name, world) for name in sorted(names, key=lambda n: n == "model")}
        except BaseException:
            self.close()
            raise

    def score_ahead(self, rollout: Rollout) -> None:
        """Begins to score completions that `score` will be asked for, by functions that have their own processes.

        A reward model waits: its processes are those of the models that train.
        """
        for part in self._training:
            if part.name in self._pools:
                texts = _texts(rollout, self._tokenizer)
                scores = self._early.submit(self._pools[part.name].score, *texts, same_step=True)
                for row, completion in enumerate(rollout.completions):
                    self._ahead[part.name, completion.prompt_id, completion.sample] = (scores, row)

    def score(self, rollout: Rollout) -> Scored:
        """The rewards of training.

        Raises:
            DataError: a completion cannot be scored and `scoring.on_failure` is `stop`, or none can be scored.
        """
        return self._scored(self._training, rollout)

    def evaluate(self, rollout: Rollout) -> Scored:
        """The rewards of an evaluation; raises as `score`."""
        return self._scored(self._evaluation, rollout)

    def close(self) -> None:
        """Ends the processes; calling it again does nothing."""
        self._early.shutdown(wait=False, cancel_futures=True)
        while self._pools:
            self._pools.popitem()[1].close()

    def _source(self, name: str, world: World) -> Source:
        if name == "model":
            return _reward_model(self._config, world)
        if name == "overlong":
            return _overlong(self._config)
        if name == "repetition":
            return _repetition()
        if self._config.scoring.workers == 0:
            function = resolve(name, self._config.scoring)
            return lambda rollout: scores_of(function, name, *_texts(rollout, self._tokenizer))
        self._pools[name] = RewardPool(name, self._config.scoring)
        return partial(self._pooled, name)

    def _pooled(self, name: str, rollout: Rollout) -> Sequence[Score]:
        """The scores of a function with processes of its own, those that were begun ahead among them."""
        early = [self._ahead.pop((name, c.prompt_id, c.sample), None) for c in rollout.completions]
        pool = self._pools[name]
        if not any(early):
            return pool.score(*_texts(rollout, self._tokenizer))
        late = np.asarray([row for row, found in enumerate(early) if found is None], dtype=np.int64)
        scores = iter(pool.score(*_texts(rollout.select(late), self._tokenizer)))
        return [next(scores) if found is None else found[0].result()[found[1]] for found in early]

    def _scored(self, parts: Sequence[Weighted], rollout: Rollout) -> Scored:
        scores = {part.name: list(self._sources[part.name](rollout)) for part in parts}
        count = len(rollout.completions)
        reasons = [_reasons(scores, i) for i in range(count)]
        kept = np.asarray([i for i in range(count) if not reasons[i]], dtype=np.int64)
        failures = [
            Failure(question=question, completion=completion, reason=reason)
            for question, completion, reason in zip(rollout.questions, rollout.completions, reasons)
            if reason
        ]
        if failures:
            self._complain(failures, count)
        values = {name: np.asarray([found[i].value for i in kept], dtype=np.float32) for name, found in scores.items()}
        total = sum((np.float32(part.weight) * values[part.name] for part in parts), np.zeros(len(kept), np.float32))
        return Scored(
            rollout=rollout if len(kept) == count else rollout.select(kept),
            rewards=np.asarray(total, dtype=np.float32),
            parts=values,
            extracted=[_extracted(scores, i) for i in kept],
            failures=failures,
        )

    def _complain(self, failures: Sequence[Failure], count: int) -> None:
        """Says which of `count` completions could not be scored, and why; raises DataError unless others are left."""
        first = failures[0]
        reply, prompt = self._tokenizer.decode(first.completion.tokens), as_text(first.question.record.prompt)
        said = f"{first.reason}; the reply is {reply!r}, the prompt {prompt!r}"
        if self._config.scoring.on_failure == "stop":
            raise DataError(f"{said}; --scoring.on_failure drop leaves such completions out")
        if len(failures) == count:
            raise DataError(f"none of {count} completions could be scored; the first: {said}")
        logger.warning("%d of %d completions could not be scored and are left out; %s", len(failures), count, said)


def _reward_model(config: PolicyConfig, world: World) -> Source:
    model = world.trainer(
        TrainerConfig.of_stage(
            config,
            model=config.reward_model,
            head="score",
            trainable=False,
            parallel=config.reward_model_parallel,
        )
    )
    most = config.scoring.clip

    def scores(rollout: Rollout) -> Sequence[Score]:
        found = model.scores(rollout.batch)
        return [
            Score(value=min(max(float(value), -most), most))
            if np.isfinite(value)
            else Score(value=None, error=f"the reward model's score is {value}")
            for value in found
        ]

    return scores


def _overlong(config: PolicyConfig) -> Source:
    """See `align_core.advantages.overlong_of`."""
    from align_core.advantages import overlong_of  # noqa: PLC0415  (brings torch)

    most, buffer = config.sampling.max_tokens, config.scoring.overlong_buffer
    return lambda rollout: _scores(overlong_of(rollout.batch, max_tokens=most, buffer=buffer))


def _repetition() -> Source:
    """See `align_core.advantages.repetition_of`."""
    from align_core.advantages import repetition_of  # noqa: PLC0415  (brings torch)

    return lambda rollout: _scores(repetition_of(rollout.batch))


def _scores(values: NDArray[np.float32]) -> list[Score]:
    return [Score(value=float(value)) for value in values]


def _texts(rollout: Rollout, tokenizer: Tokenizer) -> tuple[list[str], list[str], dict[str, list[object]]]:
    """Prompts, replies and columns as a reward function takes them; a column that a record lacks is None."""
    records = [question.record for question in rollout.questions]
    keys = dict.fromkeys(key for record in records for key in record.columns)
    columns = {key: [record.columns.get(key) for record in records] for key in keys}
    return [as_text(record.prompt) for record in records], _replies(rollout, tokenizer), columns


def _replies(rollout: Rollout, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(completion.tokens) for completion in rollout.completions]


def _reasons(scores: Mapping[str, Sequence[Score]], row: int) -> str:
    """Why a completion has no score; empty when it has all of them."""
    failed = [(name, found[row].error) for name, found in scores.items() if found[row].value is None]
    return "; ".join(f"reward {name!r} could not score a reply: {error}" for name, error in failed)


def _extracted(scores: Mapping[str, Sequence[Score]], row: int) -> str:
    found = {name: part[row].extracted for name, part in scores.items() if part[row].extracted}
    if len(scores) == 1:
        return "".join(found.values())
    return "; ".join(f"{name}: {text}" for name, text in found.items())
