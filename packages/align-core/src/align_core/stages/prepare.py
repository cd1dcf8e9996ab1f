"""From a scored rollout to the batch of an update: the trainer's own log-probs, the reference's, demonstrations.

Knows nothing about engines and processes; the formulas that need torch are behind `align_core.megatron`.
"""

from collections.abc import Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from align_core.config import LossConfig, PolicyConfig
from align_core.data.dataset import each_encoded, encoded
from align_core.data.examples import batch_of, encode_sft
from align_core.data.records import read_sft
from align_core.data.tally import tally
from align_core.stages.rewards import Scored
from align_core.stages.sync import check_canary, compare_logprobs
from align_core.stages.world import Model
from align_core.text import Tokenizer
from align_core.types import Batch


def with_logprobs(
    scored: Scored, policy: Model, reference: Model | None, config: PolicyConfig, *, version: int
) -> tuple[Batch, dict[str, float]]:
    """The batch to train on: rewards, old log-probs and the reference's, and how far the engine was from the trainer.

    With `old_logprobs: fused` the update's own forward pass gives the old log-probs and the distance.

    Raises:
        SyncError: engine and trainer disagree by more than `canary_threshold` nats on average.
    """
    batch = scored.rollout.batch.with_columns(sequences={"reward": scored.rewards})
    columns: dict[str, NDArray[np.generic]] = {}
    figures: dict[str, float] = {}
    engine_N = batch.token_column("engine_logprobs").astype(np.float32)
    if config.old_logprobs == "trainer":
        own_N = policy.logprobs(batch)
        columns["old_logprobs"] = own_N
        fresh = fresh_tokens(scored, version)  # tokens of older weights differ rightly; `corrected` measures that
        if fresh.any():
            canary = compare_logprobs(engine_N[fresh], own_N[fresh], threshold=config.canary_threshold, version=version)
            figures = {"canary_mean": canary.mean, "canary_p99": canary.p99, "canary_max": canary.max}
    elif config.old_logprobs == "engine":
        columns["old_logprobs"] = engine_N
    if reference is not None:
        columns["reference_logprobs"] = reference.logprobs(batch)
    return batch.with_columns(tokens=columns), figures


def fresh_tokens(scored: Scored, version: int) -> NDArray[np.bool_]:
    """bool [N], the tokens that the weights of `version` sampled."""
    fresh, completions = scored.rollout.batch.mask.copy(), scored.rollout.completions
    if any(c.version != version or c.versions is not None for c in completions):
        fresh[fresh] = np.concatenate([c.token_versions == version for c in completions])
    return fresh


def corrected(batch: Batch, config: PolicyConfig) -> tuple[Batch, dict[str, float]]:
    """The batch with weights against the engine's mismatch, where a method is chosen, and the figures of it."""
    from align_core.advantages import with_correction  # noqa: PLC0415  (brings torch)

    return with_correction(batch, config.correction) if config.old_logprobs == "trainer" else (batch, {})


def check_fused_canary(metrics: Mapping[str, float], scored: Scored, config: PolicyConfig, *, version: int) -> None:
    """Raises SyncError where the update's own pass found engine and trainer too far apart, if all tokens are fresh."""
    if config.old_logprobs == "fused" and np.array_equal(fresh_tokens(scored, version), scored.rollout.batch.mask):
        check_canary(metrics["canary_mean"], threshold=config.canary_threshold, version=version)


def parts_of(batch: Batch, updates: int) -> list[Batch]:
    """The rollout cut into `updates` batches of whole groups, in order."""
    group_B = batch.sequence_column("group")
    parts = np.array_split(np.unique(group_B), updates)
    return [batch.select(np.flatnonzero(np.isin(group_B, part))) for part in parts if len(part)]


def update(
    model: Model,
    batch: Batch,
    loss: LossConfig,
    config: PolicyConfig,
    *,
    step: int,
    demonstrations: "Demonstrations | None" = None,
) -> dict[str, float]:
    """`updates_per_rollout` optimizer updates, each on its own prompts; metrics are their means."""
    steps = []
    for number, part in enumerate(parts_of(batch, config.updates_per_rollout)):
        draw = step * config.updates_per_rollout + number
        steps.append(model.step(demonstrations.mixed_into(part, draw=draw) if demonstrations else part, loss))
    return {name: float(np.mean([metrics[name] for metrics in steps])) for name in steps[0]}


class Demonstrations:
    """Supervised examples that join every update, with the weight `sft_coef`."""

    def __init__(self, config: PolicyConfig, tokenizer: Tokenizer) -> None:
        assert config.sft_data is not None
        self._weight = config.sft_coef
        self.records = read_sft(config.sft_data)
        self._encode = partial(encode_sft, tokenizer, template=config.template, max_length=config.max_length)
        self._order = self.records.order(batch_size=config.sft_batch_size, seed=config.seed + 1)
        examples = ([example] for example in each_encoded(self.records, self._encode))
        self.tally = tally(examples, whole=len(self.records))

    def mixed_into(self, batch: Batch, *, draw: int) -> Batch:
        """The batch, then demonstrations: `sft_weight` on their responses, other columns 0, groups of their own."""
        examples = [encoded(self.records, i, self._encode) for i in self._order(draw).tolist()]
        return joined(batch, batch_of(examples), weight=self._weight)


def open_demonstrations(config: PolicyConfig, tokenizer: Tokenizer) -> Demonstrations | None:
    """The demonstrations of `sft_data`; None without them."""
    return Demonstrations(config, tokenizer) if config.sft_data is not None else None


def joined(batch: Batch, examples: Batch, *, weight: float) -> Batch:
    """`batch`, then `examples`, whose mask becomes `sft_weight`, so that the policy's loss does not see them."""
    count, extra = len(batch.tokens), len(examples.tokens)
    none = np.zeros(extra, np.bool_)
    columns = {
        name: np.concatenate([column, np.zeros(extra, column.dtype)]) for name, column in batch.token_columns.items()
    }
    columns["mask"] = np.concatenate([batch.mask, none])
    columns["sft_weight"] = np.concatenate([np.zeros(count, np.float32), np.float32(weight) * examples.mask])
    sequences = {
        name: np.concatenate([column, np.zeros(len(examples), column.dtype)])
        for name, column in batch.sequence_columns.items()
    }
    group_B = batch.sequence_column("group")
    first = int(group_B.max()) + 1
    sequences["group"] = np.concatenate([group_B, np.arange(first, first + len(examples))])
    return Batch(
        tokens=np.concatenate([batch.tokens, examples.tokens]),
        offsets=np.concatenate([batch.offsets, count + examples.offsets[1:]]),
        token_columns=columns,
        sequence_columns=sequences,
    )
