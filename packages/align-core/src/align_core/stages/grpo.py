"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, algorithm 1, outcome supervision).

Sample a group of completions a prompt, score them, push the policy towards those better than their group's mean.
Old log-probs are the trainer's own, on exactly the token ids that the engine sampled. `loss.variant` chooses among the
family: which advantages, which ratio, which average.
"""

from contextlib import closing

from align_core.config import GrpoConfig, TrainerConfig
from align_core.stages.evaluation import Evaluation
from align_core.stages.prepare import open_demonstrations, update, with_logprobs
from align_core.stages.rewards import Rewards
from align_core.stages.rollout import Prompts, collect, training_sampling
from align_core.stages.run import Run
from align_core.stages.seeing import Clock, describe, rates, sample_rows
from align_core.stages.sync import synchronise
from align_core.stages.world import World


def run_grpo(config: GrpoConfig, world: World) -> None:
    """Trains `config.model` on the prompts in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    prompts = Prompts(config)
    demonstrations = open_demonstrations(config, prompts.tokenizer)
    run = Run(config)
    if run.finished:
        return
    with closing(Rewards(config, world, prompts.tokenizer)) as rewards:
        policy = world.trainer(TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout))
        reference = world.trainer(TrainerConfig.of_stage(config, trainable=False)) if config.loss.kl_coef else None
        engine = world.engine(config.model, config.engine)
        evaluation = Evaluation(config, engine, prompts, rewards)
        sampling = training_sampling(config)
        for step in run.steps(policy):
            clock = Clock()
            # Version = steps done: what the engine samples with is what the policy was after that many steps.
            synchronise(policy.weights(), engine.weight_sink(), version=step)
            clock.lap("sync")
            evaluated = evaluation.at(step)
            clock.lap("evaluate")
            rollout = collect(engine, prompts.of_step(step), sampling=sampling, version=step)
            clock.lap("generate")
            scored = rewards.score(rollout)
            clock.lap("score")
            batch, canary = with_logprobs(scored, policy, reference, config, version=step)
            clock.lap("logprobs")
            if demonstrations:
                demonstrations.start(step)
            metrics = update(
                policy, batch, config.loss, updates=config.updates_per_rollout, demonstrations=demonstrations
            )
            clock.lap("train")
            run.samples(step, sample_rows(scored, prompts.tokenizer, count=config.samples))
            run.log(
                step,
                {**describe(scored), **evaluated, **metrics, **canary, **clock.laps, **rates(scored, clock.laps)},
            )
        evaluated = evaluation.of_finished(policy)
        run.finish(policy, {"records": len(prompts.records), "reward_function": config.reward, **evaluated})
