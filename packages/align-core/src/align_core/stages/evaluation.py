"""Evaluation while a stage trains: the reward of greedy answers to held-out prompts, by the engine's live weights."""

from align_core.config import PolicyConfig
from align_core.contracts import RolloutEngine
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Prompts, collect, greedy_sampling
from align_core.stages.sync import synchronise
from align_core.stages.world import Model


class Evaluation:
    """Evaluates every `eval_every` steps and at the end; does nothing without held-out prompts."""

    def __init__(self, config: PolicyConfig, engine: RolloutEngine, prompts: Prompts, rewards: Rewards) -> None:
        self._config, self._engine, self._rewards = config, engine, rewards
        self._questions = prompts.for_evaluation()
        self._sampling = greedy_sampling(config)

    def at(self, step: int) -> dict[str, float]:
        """The figures before step `step`, where one is due: the engine holds the weights of that many steps."""
        return self._evaluate(step) if self._questions and step % self._config.eval_every == 0 else {}

    def of_finished(self, policy: Model) -> dict[str, float]:
        """The figures of the finished policy, sent to the engine for it."""
        if not self._questions:
            return {}
        synchronise(policy.weights(), self._engine.weight_sink(), version=self._config.steps)
        return self._evaluate(self._config.steps)

    def _evaluate(self, version: int) -> dict[str, float]:
        rollout = collect(self._engine, self._questions, sampling=self._sampling, version=version)
        scored = self._rewards.evaluate(rollout)
        figures = {"eval_reward": float(scored.rewards.mean())}
        if scored.failed:
            figures["eval_failed_scores"] = scored.failed / len(self._questions)
        return figures
