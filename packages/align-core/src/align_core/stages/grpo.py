"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, algorithm 1, outcome supervision).

Sample a group of completions a prompt, score them, push the policy towards those better than their group's mean.
Old log-probs are the trainer's own, on exactly the token ids that the engine sampled. `loss.variant` chooses among the
family: which advantages, which ratio, which average.
"""

from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np

from align_core.config import GrpoConfig, TrainerConfig
from align_core.stages.clock import Clock
from align_core.stages.collect import Collector
from align_core.stages.online import open_run
from align_core.stages.prepare import check_fused_canary, corrected, open_demonstrations, update, with_logprobs
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Prompts
from align_core.stages.seeing import Reporter
from align_core.stages.world import World
from align_core.types import Batch


def run_grpo(config: GrpoConfig, world: World) -> None:
    """Trains `config.model` on the prompts in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    prompts = Prompts(config)
    demonstrations = open_demonstrations(config, prompts.tokenizer)
    run = open_run(config, prompts, demonstrations)
    if run.finished:
        return
    loss = replace(config.loss, length=config.loss.length or config.sampling.max_tokens)
    with closing(Rewards(config, world, prompts.tokenizer)) as rewards:
        policy = world.trainer(TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout))
        reference = world.trainer(TrainerConfig.of_stage(config, trainable=False)) if loss.needs_reference else None
        collector = Collector(config, world, prompts, rewards)
        reporter = Reporter(run, config, prompts.tokenizer)
        for step in run.steps(policy, state=[collector]):
            clock = Clock()
            scored, evaluated = collector.collect(step, policy, clock)
            batch, canary = with_logprobs(scored, policy, reference, config, version=step)
            clock.lap("logprobs")
            batch = with_advantages(batch, config)
            batch, mismatch = corrected(batch, config)
            metrics = update(policy, batch, loss, config, step=step, demonstrations=demonstrations)
            clock.lap("train")
            reporter.step(step, scored, clock, {**evaluated, **metrics, **canary, **mismatch})
            check_fused_canary(metrics, scored, config, version=step)
        result = {"records": len(prompts.records), "reward_function": config.reward}
        run.finish(policy, result, evaluate=partial(collector.evaluate_finished, policy))


def with_advantages(batch: Batch, config: GrpoConfig) -> Batch:
    """The batch with `advantages` over the whole rollout; without tied groups, where the config says so."""
    from align_core.advantages import mixed_rows, with_group_advantages  # noqa: PLC0415  (brings torch)

    batch = with_group_advantages(config.loss, batch)
    rows = mixed_rows(batch) if config.drop_tied_groups else np.arange(len(batch))
    return batch.select(rows) if 0 < len(rows) < len(batch) else batch
