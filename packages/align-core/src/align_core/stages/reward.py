"""Reward model: a scalar head that learns to rank the responses of a prompt (Bradley-Terry over all ordered pairs)."""

from collections.abc import Callable, Sequence

import numpy as np

from align_core.config import RewardConfig, TrainerConfig
from align_core.data.dataset import Dataset, encoded
from align_core.data.examples import Example, batch_of, encode_ranked
from align_core.data.prefetch import prefetched
from align_core.data.records import RankedRecord, read_ranked
from align_core.errors import DataError
from align_core.stages.calibration import calibration, pair_margins
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation
from align_core.stages.offline import OfflineData, open_data
from align_core.stages.preflight import open_tokenizer
from align_core.stages.world import Model, World
from align_core.types import Batch

Ranked = tuple[list[Example], Sequence[float]]
"""The responses of a record as tokens, and their scores."""


def open_reward(config: RewardConfig) -> OfflineData[RankedRecord, Ranked]:
    """The data as it is trained on.

    Raises:
        DataError: held-out records that rank nothing; and what `open_tokenizer` and `open_data` raise.
    """
    tokenizer = open_tokenizer(config)

    def encode(record: RankedRecord) -> Ranked:
        examples = encode_ranked(tokenizer, record, template=config.template, max_length=config.max_length)
        return examples, record.scores

    data = open_data(config, read_ranked, encode, lambda ranked: ranked[0])
    if data.held_out is not None:
        _check_ranked(data.held_out)
    return data


def run_reward(config: RewardConfig, world: World) -> None:
    """Trains a scalar head and the backbone of `config.model`; what `config.eval_data` shows goes to result.json."""
    data = open_reward(config)
    records, held_out, order, encode = data.records, data.held_out, data.order, data.encode
    run = data.run(config)
    if run.finished:
        return
    model = world.trainer(TrainerConfig.of_stage(config, head="score"))

    def prepare(step: int) -> Batch:
        return ranked_batch([encoded(records, i, encode) for i in order(step)])

    evaluation = Evaluation(config, model, (lambda: evaluate(model, held_out, encode)) if held_out else None)
    with prefetched(prepare, steps=config.steps) as batches:
        for step in run.steps(model):
            clock = Clock()
            measured = evaluation.before(step)
            clock.lap("evaluate")
            batch = batches(step)
            clock.lap("data")
            metrics = model.step(batch, config.loss)
            clock.lap("train")
            run.log(step, {**metrics, **measured, **clock.laps})
    result = {"records": len(records), "eval_records": len(held_out or ()), "eval_accuracy": None}
    run.finish(model, result, evaluate=evaluation.at_end)


def ranked_batch(groups: Sequence[Ranked]) -> Batch:
    """All responses of some prompts end to end, with `group` (which prompt) and `label` (its score)."""
    batch = batch_of([example for examples, _ in groups for example in examples])
    group = np.repeat(np.arange(len(groups)), [len(examples) for examples, _ in groups])
    label = np.concatenate([np.asarray(scores, dtype=np.float32) for _, scores in groups])
    return batch.with_columns(sequences={"group": group, "label": label})


def evaluate(
    model: Model, held_out: Dataset[RankedRecord], encode: Callable[[RankedRecord], Ranked]
) -> dict[str, float]:
    """Accuracy and calibration over all ordered pairs of the held-out records, mean and spread of the scores."""
    scores, margins = [], []
    for part in held_out.parts():
        batch = ranked_batch([encode(record) for record in part])
        found = model.scores(batch)
        scores.append(found)
        margins.append(pair_margins(found, batch.sequence_column("label"), batch.sequence_column("group")))
    every = np.concatenate(scores).astype(np.float64)
    measured = {**calibration(np.concatenate(margins)), "score_mean": every.mean(), "score_std": every.std()}
    return {f"eval_{name}": float(value) for name, value in measured.items()}


def _check_ranked(held_out: Dataset[RankedRecord]) -> None:
    if not any(len(set(record.scores)) > 1 for record in held_out):
        raise DataError(
            f"no held-out record (the first is {held_out.where(0)}) scores one response above another, so that there "
            "is nothing to measure; give eval_data with scores that differ"
        )
