"""The sampling half of a step, alike for every policy: weights to the engine, evaluation, completions, their rewards.

A stage's other half (log-probs, advantages, updates) is in the stage itself. Knows nothing about losses.
"""

from align_core.config import PolicyConfig
from align_core.stages.clock import Clock
from align_core.stages.rewards import Rewards, Scored
from align_core.stages.rollout import Prompts, collect, greedy_sampling, training_sampling
from align_core.stages.seeing import part_means
from align_core.stages.sync import synchronise
from align_core.stages.world import Model, World


class Collector:
    """Samples with the policy's newest weights, step by step."""

    def __init__(self, config: PolicyConfig, world: World, prompts: Prompts, rewards: Rewards) -> None:
        """Starts the engine."""
        self._config, self._prompts, self._rewards = config, prompts, rewards
        self._engine = world.engine(config.model, config.engine)
        self._held_out = prompts.for_evaluation()

    def collect(self, step: int, policy: Model, clock: Clock) -> tuple[Scored, dict[str, float]]:
        """The scored completions of `step`, and the evaluation of the weights that sampled them, where one is due."""
        # Version = steps done: what the engine samples with is what the policy was after that many steps.
        synchronise(policy.weights(), self._engine.weight_sink(), version=step)
        clock.lap("sync")
        evaluated = self._evaluate(step) if step % self._config.eval_every == 0 else {}
        clock.lap("evaluate")
        questions = self._prompts.of_step(step)
        rollout = collect(self._engine, questions, sampling=training_sampling(self._config), version=step)
        clock.lap("generate")
        scored = self._rewards.score(rollout)
        clock.lap("score")
        return scored, evaluated

    def evaluate_finished(self, policy: Model) -> dict[str, float]:
        """The evaluation of the finished policy, sent to the engine for it; nothing without held-out prompts."""
        if not self._held_out:
            return {}
        synchronise(policy.weights(), self._engine.weight_sink(), version=self._config.steps)
        return self._evaluate(self._config.steps)

    def _evaluate(self, version: int) -> dict[str, float]:
        """The mean reward of greedy answers to the held-out prompts, by the weights that the engine holds."""
        if not self._held_out:
            return {}
        rollout = collect(self._engine, self._held_out, sampling=greedy_sampling(self._config), version=version)
        scored = self._rewards.evaluate(rollout)
        figures = {"eval_reward": float(scored.rewards.mean()), **part_means(scored, "eval_reward")}
        if scored.failed:
            figures["eval_failed_scores"] = scored.failed / len(self._held_out)
        return figures
