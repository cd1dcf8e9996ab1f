"""Online DPO (Guo et al. 2024, arXiv:2402.04792): preferences between the policy's own completions.

Sample a group of completions a prompt, score them, and take the order of their rewards as preferences; the loss is
DPO's, against the frozen model that training started from. Groups with equal rewards teach nothing.
"""

from contextlib import closing
from functools import partial

from align_core.config import OnlineDpoConfig, TrainerConfig
from align_core.stages.clock import Clock
from align_core.stages.collect import Collector
from align_core.stages.online import open_run
from align_core.stages.prepare import check_fused_canary, corrected, open_demonstrations, update, with_logprobs
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Prompts
from align_core.stages.seeing import Reporter
from align_core.stages.world import World


def run_online_dpo(config: OnlineDpoConfig, world: World) -> None:
    """Trains `config.model` on the prompts in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    prompts = Prompts(config)
    demonstrations = open_demonstrations(config, prompts.tokenizer)
    run = open_run(config, prompts, demonstrations)
    if run.finished:
        return
    with closing(Rewards(config, world, prompts.tokenizer)) as rewards:
        policy = world.trainer(TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout))
        reference = world.trainer(TrainerConfig.of_stage(config, trainable=False))
        collector = Collector(config, world, prompts, rewards)
        reporter = Reporter(run, config, prompts.tokenizer)
        for step in run.steps(policy, state=[collector]):
            clock = Clock()
            scored, evaluated = collector.collect(step, policy, clock)
            batch, canary = with_logprobs(scored, policy, reference, config, version=step)
            clock.lap("logprobs")
            batch, mismatch = corrected(batch, config)
            metrics = update(policy, batch, config.loss, config, step=step, demonstrations=demonstrations)
            clock.lap("train")
            reporter.step(step, scored, clock, {**evaluated, **metrics, **canary, **mismatch})
            check_fused_canary(metrics, scored, config, version=step)
        result = {"records": len(prompts.records), "reward_function": config.reward}
        run.finish(policy, result, evaluate=partial(collector.evaluate_finished, policy))
