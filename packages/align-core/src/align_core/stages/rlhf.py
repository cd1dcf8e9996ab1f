"""Reinforcement learning from human feedback by PPO (Ouyang et al. 2022, arXiv:2203.02155, with GAE).

Four models: the policy and its frozen reference start from the SFT model, the value model from the reward model, whose
score is what completions earn. The KL to the reference is a cost on every token, inside the reward; its coefficient may
be steered and is part of the checkpoint.
"""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np

from align_core.config import KlConfig, RlhfConfig, TrainerConfig
from align_core.stages.clock import Clock
from align_core.stages.collect import Collector
from align_core.stages.online import open_run
from align_core.stages.prepare import corrected, open_demonstrations, update, with_logprobs
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Prompts
from align_core.stages.seeing import Reporter
from align_core.stages.world import Model, World
from align_core.types import Batch

_VALUE_METRICS = ("loss", "clip_fraction", "grad_norm", "lr")


def run_rlhf(config: RlhfConfig, world: World) -> None:
    """Trains `config.model` on the prompts in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    prompts = Prompts(config)
    demonstrations = open_demonstrations(config, prompts.tokenizer)
    run = open_run(config, prompts, demonstrations)
    if run.finished:
        return
    with closing(Rewards(config, world, prompts.tokenizer)) as rewards:
        policy = world.trainer(policy_config(config))
        reference = world.trainer(TrainerConfig.of_stage(config, trainable=False))
        value = world.trainer(value_config(config))
        kl = SteeredKl(config.kl)
        collector = Collector(config, world, prompts, rewards)
        reporter = Reporter(run, config, prompts.tokenizer)
        for step in run.steps(policy, beside={"value": value}, state=[kl, collector]):
            clock = Clock()
            scored, evaluated = collector.collect(step, policy, clock)
            batch, canary = with_logprobs(scored, policy, reference, config, version=step)
            clock.lap("logprobs")
            batch = batch.with_columns(tokens={"old_values": value.values(batch)})
            clock.lap("values")
            batch, penalty = with_advantages(batch, config, kl)
            batch, mismatch = corrected(batch, config)
            metrics = update_value(value, batch, config, step=step)
            if step >= config.value_warmup:
                metrics |= update(policy, batch, config.loss, config, step=step, demonstrations=demonstrations)
            clock.lap("train")
            reporter.step(step, scored, clock, {**evaluated, **metrics, **penalty, **canary, **mismatch})
        result = {"records": len(prompts.records), "reward_function": config.reward}
        run.finish(policy, result, evaluate=partial(collector.evaluate_finished, policy), beside={"value": value})


def policy_config(config: RlhfConfig) -> TrainerConfig:
    """The policy: its schedule counts the steps in which it learns."""
    whole = TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout)
    waiting = config.value_warmup * config.updates_per_rollout
    return replace(whole, steps=whole.steps - waiting)


def value_config(config: RlhfConfig) -> TrainerConfig:
    """The value model: the reward model's weights and head, unless the config names others."""
    return TrainerConfig.of_stage(
        config,
        model=config.value_model or config.reward_model,
        head="score",
        parallel=config.value_parallel,
        optimizer=config.value_optimizer,
        updates_per_step=config.updates_per_rollout,
    )


class SteeredKl:
    """The coefficient of the KL penalty, fixed or steered; a `Stateful` of the run."""

    def __init__(self, config: KlConfig) -> None:
        from align_core.advantages import make_kl_controller  # noqa: PLC0415  (brings torch)

        self._controller = make_kl_controller(config)

    @property
    def coef(self) -> float:
        """The coefficient of now, per nat."""
        return self._controller.coef

    def update(self, *, kl: float, num_samples: int) -> None:
        """Takes the mean KL of `num_samples` completions, nats a completion, into account."""
        self._controller.update(kl=kl, num_samples=num_samples)

    def state(self) -> Mapping[str, str]:
        """Exact: a float's repr is read back to the same float."""
        return {f"kl_{name}": repr(value) for name, value in self._controller.state_dict().items()}

    def restore(self, state: Mapping[str, str]) -> None:
        """Continues from what `state` gave."""
        names = self._controller.state_dict()
        self._controller.load_state_dict({name: float(state[f"kl_{name}"]) for name in names})


def with_advantages(batch: Batch, config: RlhfConfig, kl: SteeredKl) -> tuple[Batch, dict[str, float]]:
    """The batch with `advantages` and `returns`; steers the KL coefficient afterwards."""
    from align_core.advantages import kl_of_tokens, with_value_advantages  # noqa: PLC0415  (brings torch)

    kl_N = kl_of_tokens(batch, estimator=config.kl.estimator)
    coef = kl.coef
    batch = with_value_advantages(
        batch, kl_N, kl_coef=coef, gamma=config.gamma, lam=config.lam, normalise=config.whiten
    )
    a_completion = float(kl_N.sum()) / len(batch)
    kl.update(kl=a_completion, num_samples=len(batch))
    figures = {
        "kl": a_completion,
        "kl_token": float(kl_N.sum()) / int(batch.mask.sum()),
        "kl_coef": coef,
        "return": float(np.mean(batch.token_column("returns")[batch.mask].astype(np.float64))),
    }
    return batch, figures


def update_value(value: Model, batch: Batch, config: RlhfConfig, *, step: int) -> dict[str, float]:
    """Updates of the value model; its metrics begin with `value_`."""
    found = update(value, batch, config.value_loss, config, step=step)
    metrics = {f"value_{name.removeprefix('value_')}": found[name] for name in _VALUE_METRICS if name in found}
    if {"squared_error", "squared_return", "return", "value"} <= found.keys():
        metrics |= {"value_mean": found["value"], "value_explained": explained_variance(found)}
    return metrics


def explained_variance(found: Mapping[str, float]) -> float:
    """Share of the returns' variance that the values explain; 0 where the returns do not vary."""
    spread = found["squared_return"] - found["return"] ** 2
    left = found["squared_error"] - (found["return"] - found["value"]) ** 2
    return 0.0 if spread <= 0 else 1.0 - left / spread  # NaN of NaN, as in a skipped step
