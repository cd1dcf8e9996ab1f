"""The sampling half of a step, alike for every policy: weights to the engine, evaluation, completions, their rewards.

A stage's other half (log-probs, advantages, updates) is in the stage itself. Knows nothing about losses.
"""

from collections.abc import Mapping

import numpy as np

from align_core.config import PolicyConfig
from align_core.contracts import RolloutEngine
from align_core.stages.clock import Clock
from align_core.stages.rewards import Rewards, Scored
from align_core.stages.rollout import Prompts, Rollout, collect, greedy_sampling
from align_core.stages.schedule import open_schedule
from align_core.stages.seeing import part_means
from align_core.stages.sync import synchronise
from align_core.stages.turns import Turns
from align_core.stages.world import Model, World


class Collector:
    """Samples step by step, on the schedule of the config; a `Stateful` of the run."""

    def __init__(self, config: PolicyConfig, world: World, prompts: Prompts, rewards: Rewards) -> None:
        """Starts the engine."""
        self._config, self._rewards = config, rewards
        self._engine = world.engine(config.model, config.engine)
        self._turns = Turns(world, self._engine, sleep=config.engine.sleep)
        self._schedule = open_schedule(config, self._engine, prompts, rewards.score_ahead)
        self._held_out, self._evaluations = prompts.for_evaluation(), prompts.evaluations

    def collect(self, step: int, policy: Model, clock: Clock) -> tuple[Scored, dict[str, float]]:
        """The scored completions of `step`; the evaluation of the weights before it, where one is due; their age."""
        figures: dict[str, float] = {}

        def send(engine: RolloutEngine) -> None:
            # Version = steps done: the policy as it was after that many steps.
            self._send(engine, policy, version=step)
            clock.lap("sync")
            figures.update(self._evaluate(engine, step) if step % self._config.eval_every == 0 else {})
            clock.lap("evaluate")

        rollout = self._schedule.rollout(step, send, clock)
        self._turns.for_models()
        scored = self._rewards.score(rollout)
        clock.lap("score")
        return scored, figures | (staleness(rollout, step) if self._config.schedule.kind != "sync" else {})

    def evaluate_finished(self, policy: Model) -> dict[str, float]:
        """The evaluation of the finished policy, sent to the engine for it; nothing where none is asked for."""
        if not self._held_out and not self._evaluations:
            return {}
        self._send(self._engine, policy, version=self._config.steps)
        return self._evaluate(self._engine, self._config.steps)

    def state(self) -> Mapping[str, str]:
        """What is sampled but not trained on, for a checkpoint."""
        return self._schedule.state()

    def restore(self, state: Mapping[str, str]) -> None:
        """Continues from `state`."""
        self._schedule.restore(state)

    def _send(self, engine: RolloutEngine, policy: Model, *, version: int) -> None:
        self._turns.for_weights_of(policy)
        chosen = self._config.engine
        synchronise(
            policy.weights(),
            engine.weight_sink(),
            version=version,
            verify=chosen.verify,
            transport=chosen.transport,
        )
        self._turns.for_engine()

    def _evaluate(self, engine: RolloutEngine, version: int) -> dict[str, float]:
        """The mean reward of greedy answers to the held-out prompts, and the evaluations asked for by name; all of the
        weights that the engine holds."""
        further = self._evaluations(engine, step=version)
        if not self._held_out:
            return further
        rollout = collect(engine, self._held_out, sampling=greedy_sampling(self._config), version=version)
        scored = self._rewards.evaluate(rollout)
        figures = {"eval_reward": float(scored.rewards.mean()), **part_means(scored, "eval_reward")}
        if scored.failures:
            figures["eval_failed_scores"] = len(scored.failures) / len(self._held_out)
        return figures | further


def staleness(rollout: Rollout, step: int) -> dict[str, float]:
    """How many updates ago the weights that sampled the tokens were those of now."""
    ages = step - np.concatenate([completion.token_versions for completion in rollout.completions])
    return {"staleness": float(ages.mean()), "staleness_max": float(ages.max())}
