"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, algorithm 1, outcome supervision).

Sample a group of completions a prompt, score them, push the policy towards those better than their group's mean.
Old log-probs are the trainer's own, on exactly the token ids that the engine sampled.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from align_core.config import GrpoConfig, SamplingConfig, TrainerConfig
from align_core.contracts import RolloutEngine
from align_core.data.order import indices_of_step
from align_core.data.records import PromptRecord, read_prompts
from align_core.errors import DataError
from align_core.stages.rewards import Reward, make_reward
from align_core.stages.run import Run
from align_core.stages.sync import check_versions, compare_logprobs, synchronise
from align_core.stages.world import Model, World
from align_core.text import Tokenizer, load_tokenizer, render_prompt
from align_core.types import Batch, Completion, Prompt


def run_grpo(config: GrpoConfig, world: World) -> None:
    """Trains `config.model` on the prompts in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    tokenizer = load_tokenizer(config.model)
    records = read_prompts(config.data)
    prompts = _encode(tokenizer, records, config)
    held_out = read_prompts(config.eval_data) if config.eval_data else []
    held_out_prompts = _encode(tokenizer, held_out, config)
    run = Run(config)
    if run.finished:
        return
    reward = make_reward(config, world, tokenizer)
    policy = world.trainer(TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout))
    reference = world.trainer(TrainerConfig.of_stage(config, trainable=False)) if config.loss.kl_coef else None
    engine = world.engine(config.model, config.engine)
    sampling = replace(config.sampling, seed=config.sampling.seed + config.seed)
    greedy = replace(sampling, n=1, temperature=0.0)

    def evaluate(version: int) -> dict[str, float]:
        """The mean reward of greedy answers to the held-out prompts, by the weights that the engine holds."""
        if not held_out:
            return {}
        first_id = config.steps * config.batch_size  # beyond the ids of all training prompts
        asked = [Prompt(id=first_id + k, tokens=tokens) for k, tokens in enumerate(held_out_prompts)]
        rollout = _roll_out(engine, reward, held_out, asked, sampling=greedy, version=version)
        return {"eval_reward": float(rollout.rewards.mean())}

    for step in run.steps(policy):
        clock = _Clock()
        # Version = steps done: what the engine samples with is what the policy was after that many steps.
        synchronise(policy.weights(), engine.weight_sink(), version=step)
        clock.lap("sync")
        evaluation = evaluate(step) if step % config.eval_every == 0 else {}
        clock.lap("evaluate")
        chosen = indices_of_step(step, records=len(prompts), batch_size=config.batch_size, seed=config.seed)
        asked = [Prompt(id=step * config.batch_size + k, tokens=prompts[i]) for k, i in enumerate(chosen)]
        rollout = _roll_out(engine, reward, [records[i] for i in chosen], asked, sampling=sampling, version=step)
        clock.restart()
        batch, canary = _with_logprobs(rollout, policy, reference, threshold=config.canary_threshold, version=step)
        metrics = _update(policy, batch, config)
        clock.lap("train")
        described = {**_describe(rollout, sampling.n), **evaluation, **metrics, **canary}
        run.log(step, {**described, **rollout.seconds, **clock.laps})
    if held_out:
        synchronise(policy.weights(), engine.weight_sink(), version=config.steps)
    run.finish(policy, {"records": len(records), "reward_function": config.reward, **evaluate(config.steps)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Completions with their rewards."""

    completions: list[Completion]
    batch: Batch
    """Prompt and completion of each, with the columns of `rollout_batch`."""
    rewards: NDArray[np.float32]
    """float32 [B]."""
    seconds: dict[str, float]
    """`seconds_generate` and `seconds_score`."""


def _roll_out(
    engine: RolloutEngine,
    reward: Reward,
    records: Sequence[PromptRecord],
    prompts: Sequence[Prompt],
    *,
    sampling: SamplingConfig,
    version: int,
) -> Rollout:
    """Samples `sampling.n` completions a prompt with the weights `version`, and scores them."""
    clock = _Clock()
    completions = engine.generate(prompts, sampling)
    check_versions(completions, version=version)
    clock.lap("generate")
    batch = rollout_batch(prompts, completions)
    rewards = reward([record for record in records for _ in range(sampling.n)], completions, batch)
    clock.lap("score")
    return Rollout(completions=completions, batch=batch, rewards=rewards, seconds=clock.laps)


def _with_logprobs(
    rollout: Rollout, policy: Model, reference: Model | None, *, threshold: float, version: int
) -> tuple[Batch, dict[str, float]]:
    """The batch to train on, with the trainer's own log-probs, and how far the engine's were from them."""
    batch = rollout.batch
    columns = {"old_logprobs": policy.logprobs(batch)}
    if reference:
        columns["reference_logprobs"] = reference.logprobs(batch)
    engine_N = batch.token_column("engine_logprobs")[batch.mask].astype(np.float32)
    canary = compare_logprobs(engine_N, columns["old_logprobs"][batch.mask], threshold=threshold, version=version)
    batch = batch.with_columns(tokens=columns, sequences={"reward": rollout.rewards})
    return batch, {"canary_mean": canary.mean, "canary_p99": canary.p99, "canary_max": canary.max}


def rollout_batch(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> Batch:
    """Prompt and completion of every sample end to end: `mask` and `engine_logprobs` on the sampled tokens, `group`."""
    by_id = {prompt.id: prompt.tokens for prompt in prompts}
    heads = [by_id[c.prompt_id] for c in completions]
    return Batch.of(
        [np.concatenate([head, c.tokens]) for head, c in zip(heads, completions)],
        tokens={
            "mask": [np.arange(len(head) + len(c.tokens)) >= len(head) for head, c in zip(heads, completions)],
            "engine_logprobs": [
                np.concatenate([np.zeros(len(head), np.float32), c.logprobs]) for head, c in zip(heads, completions)
            ],
        },
        columns={"group": np.asarray([c.prompt_id for c in completions], dtype=np.int64)},
    )


def _encode(tokenizer: Tokenizer, records: Sequence[PromptRecord], config: GrpoConfig) -> list[NDArray[np.int32]]:
    room = min(config.max_length, config.engine.context) - config.sampling.max_tokens
    if room < 1:
        raise DataError(
            f"sampling.max_tokens {config.sampling.max_tokens} leaves no room for a prompt in the shorter of "
            f"max_length {config.max_length} and engine.context {config.engine.context}; lower it"
        )
    return [render_prompt(tokenizer, r.prompt, template=config.template, max_tokens=room) for r in records]


def _update(policy: Model, batch: Batch, config: GrpoConfig) -> dict[str, float]:
    """One or several optimizer updates on a rollout, each on its own prompts; metrics are their means."""
    groups = np.unique(batch.sequence_column("group"))
    parts = np.array_split(groups, config.updates_per_rollout)
    steps = [
        policy.step(batch.select(np.flatnonzero(np.isin(batch.sequence_column("group"), part))), config.loss)
        for part in parts
    ]
    return {name: float(np.mean([metrics[name] for metrics in steps])) for name in steps[0]}


def _describe(rollout: Rollout, n: int) -> dict[str, float]:
    return {
        "reward": float(rollout.rewards.mean()),
        "reward_std": float(rollout.rewards.std()),
        "tied_groups": float(np.mean(rollout.rewards.reshape(-1, n).std(axis=1) == 0)),
        "length": float(np.mean([len(c.tokens) for c in rollout.completions])),
        "truncated": float(np.mean([c.finish_reason == "length" for c in rollout.completions])),
    }


class _Clock:
    """Seconds by phase, as `seconds_NAME`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.restart()

    def restart(self) -> None:
        """The next lap begins now."""
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """The lap that ends now was `name`."""
        self.laps[f"seconds_{name}"] = time.perf_counter() - self._last
        self.restart()
