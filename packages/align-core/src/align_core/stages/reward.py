"""Reward model: a scalar head that learns to rank the responses of a prompt (Bradley-Terry over all ordered pairs)."""

from collections.abc import Sequence

import numpy as np

from align_core.config import RewardConfig, TrainerConfig
from align_core.data.examples import Example, batch_of, ranked_examples
from align_core.data.order import indices_of_step
from align_core.data.records import RankedRecord, read_ranked
from align_core.stages.run import Run
from align_core.stages.world import Model, World
from align_core.text import Tokenizer, load_tokenizer
from align_core.types import Batch

_EVAL_RECORDS = 64  # records scored at once while evaluating; bounds the driver's memory, changes no result


def run_reward(config: RewardConfig, world: World) -> None:
    """Trains a scalar head and the backbone of `config.model`; accuracy on `config.eval_data` goes to result.json."""
    tokenizer = load_tokenizer(config.model)
    records = read_ranked(config.data)
    held_out = read_ranked(config.eval_data) if config.eval_data else []
    groups, held_out_groups = (_encode(tokenizer, part, config) for part in (records, held_out))
    run = Run(config)
    if run.finished:
        return
    model = world.trainer(TrainerConfig.of_stage(config, head="score"))
    for step in run.steps(model):
        chosen = indices_of_step(step, records=len(groups), batch_size=config.batch_size, seed=config.seed)
        batch = ranked_batch([groups[i] for i in chosen], [records[i].scores for i in chosen])
        run.log(step, model.step(batch, config.loss))
    accuracy = _accuracy(model, held_out_groups, held_out)
    run.finish(model, {"records": len(records), "eval_records": len(held_out), "eval_accuracy": accuracy})


def ranked_batch(groups: Sequence[Sequence[Example]], scores: Sequence[Sequence[float]]) -> Batch:
    """All responses of some prompts end to end, with `group` (which prompt) and `label` (its score)."""
    batch = batch_of([example for group in groups for example in group])
    group = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    label = np.concatenate([np.asarray(s, dtype=np.float32) for s in scores])
    return batch.with_columns(sequences={"group": group, "label": label})


def _encode(tokenizer: Tokenizer, records: Sequence[RankedRecord], config: RewardConfig) -> list[list[Example]]:
    return ranked_examples(tokenizer, records, template=config.template, max_length=config.max_length)


def _accuracy(model: Model, groups: Sequence[Sequence[Example]], records: Sequence[RankedRecord]) -> float | None:
    """Share of ordered pairs (one response scored above another) that the model orders alike; None without pairs."""
    right = pairs = 0
    for first in range(0, len(groups), _EVAL_RECORDS):
        part = slice(first, first + _EVAL_RECORDS)
        batch = ranked_batch(groups[part], [r.scores for r in records[part]])
        scores, label = model.scores(batch), batch.sequence_column("label").astype(np.float32)
        same = np.equal.outer(*(2 * [batch.sequence_column("group")]))
        better = same & np.greater.outer(label, label)
        right += int(np.sum(better & np.greater.outer(scores, scores)))
        pairs += int(np.sum(better))
    return right / pairs if pairs else None
