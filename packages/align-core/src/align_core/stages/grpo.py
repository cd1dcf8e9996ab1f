"""Group-relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, algorithm 1, outcome supervision).

Sample a group of completions a prompt, score them, push the policy towards those better than their group's mean.
Old log-probs are the trainer's own, on exactly the token ids that the engine sampled.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from align_core.config import GrpoConfig, TrainerConfig
from align_core.data.order import indices_of_step
from align_core.data.records import PromptRecord, read_prompts
from align_core.errors import DataError
from align_core.stages.rewards import make_reward
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
    run = Run(config)
    if run.finished:
        return
    reward = make_reward(config, world, tokenizer)
    policy = world.trainer(TrainerConfig.of_stage(config, updates_per_step=config.updates_per_rollout))
    reference = world.trainer(TrainerConfig.of_stage(config, trainable=False)) if config.loss.kl_coef else None
    engine = world.engine(config.model, config.engine)

    for step in run.steps(policy):
        clock = _Clock()
        # Version = steps done: what the engine samples with is what the policy was after that many steps.
        synchronise(policy.weights(), engine.weight_sink(), version=step)
        clock.lap("sync")
        chosen = indices_of_step(step, records=len(prompts), batch_size=config.batch_size, seed=config.seed)
        asked = [Prompt(id=step * config.batch_size + k, tokens=prompts[i]) for k, i in enumerate(chosen)]
        completions = engine.generate(asked, replace(config.sampling, seed=config.sampling.seed + config.seed))
        check_versions(completions, version=step)
        clock.lap("generate")
        batch = rollout_batch(asked, completions)
        rewards = reward([records[i] for i in chosen for _ in range(config.sampling.n)], completions, batch)
        clock.lap("score")
        old = policy.logprobs(batch)
        columns = {"old_logprobs": old}
        if reference:
            columns["reference_logprobs"] = reference.logprobs(batch)
        sampled = batch.mask
        canary = compare_logprobs(
            batch.token_column("engine_logprobs")[sampled].astype(np.float32),
            old[sampled],
            threshold=config.canary_threshold,
            version=step,
        )
        batch = batch.with_columns(tokens=columns, sequences={"reward": rewards})
        metrics = _update(policy, batch, config)
        clock.lap("train")
        run.log(
            step,
            {
                **_describe(rewards, completions, config.sampling.n),
                **metrics,
                "canary_mean": canary.mean,
                "canary_p99": canary.p99,
                "canary_max": canary.max,
                **clock.laps,
            },
        )
    run.finish(policy, {"records": len(records), "reward": config.reward})


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


def _describe(rewards: NDArray[np.float32], completions: Sequence[Completion], n: int) -> dict[str, float]:
    lengths = [len(c.tokens) for c in completions]
    return {
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "tied_groups": float(np.mean(rewards.reshape(-1, n).std(axis=1) == 0)),
        "length": float(np.mean(lengths)),
        "truncated": float(np.mean([c.finish_reason == "length" for c in completions])),
    }


class _Clock:
    """Seconds by phase, as `seconds_NAME`."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[f"seconds_{name}"] = now - self._last
        self._last = now
