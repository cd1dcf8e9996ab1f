"""Preference optimisation without sampling and without a reward model: DPO and its kin.

The reference is the model before its training; SimPO and ORPO have none.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from align_core.config import DpoConfig, TrainerConfig
from align_core.data.dataset import Dataset, encoded
from align_core.data.examples import Pair, batch_of, encode_pair
from align_core.data.prefetch import prefetched
from align_core.data.records import PreferenceRecord, read_preferences
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.offline import OfflineData, open_data
from align_core.stages.preflight import open_tokenizer
from align_core.stages.reference import Reference, References, with_reference
from align_core.stages.world import World
from align_core.types import Batch


def open_dpo(config: DpoConfig) -> OfflineData[PreferenceRecord, Pair]:
    """The data as it is trained on; raises what `open_tokenizer` and `open_data` raise."""
    tokenizer = open_tokenizer(config)
    encode = partial(encode_pair, tokenizer, template=config.template, max_length=config.max_length)
    return open_data(config, read_preferences, encode, list)


def run_dpo(config: DpoConfig, world: World) -> None:
    """Trains `config.model` on the preferences in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    data = open_dpo(config)
    records, held_out, order, encode = data.records, data.held_out, data.order, data.encode
    run = data.run(config)
    if run.finished:
        return

    def pairs_of(source: Dataset[PreferenceRecord], keys: Sequence[int]) -> Batch:
        return pair_batch([encoded(source, key, encode) for key in keys])

    def pair_of(source: Dataset[PreferenceRecord], key: int) -> Batch:
        return pairs_of(source, [key])

    model = world.trainer(TrainerConfig.of_stage(config))
    references: dict[str, Reference] = {}
    if config.loss.needs_reference:
        make = References(config, world, model)
        used = np.unique([order(step) for step in range(config.steps)]).tolist()
        references["data"] = make.of("data", used, partial(pair_of, records))
        if held_out:
            references["eval_data"] = make.of("eval_data", range(len(held_out)), partial(pair_of, held_out))

    def evaluate() -> dict[str, float]:
        assert held_out is not None
        parts = []
        for keys in held_out.index_parts():
            batch = with_reference(references.get("eval_data"), keys, pairs_of(held_out, keys))
            parts.append((model.evaluate(batch, config.loss), len(keys)))
        return mean_over(parts)

    evaluation = Evaluation(config, model, evaluate if held_out else None)

    def prepare(step: int) -> tuple[list[int], Batch]:
        keys = order(step).tolist()
        return keys, pairs_of(records, keys)

    with prefetched(prepare, steps=config.steps) as batches:
        for step in run.steps(model):
            clock = Clock()
            measured = evaluation.before(step)
            clock.lap("evaluate")
            keys, batch = batches(step)
            clock.lap("data")
            batch = with_reference(references.get("data"), keys, batch)
            clock.lap("reference")
            metrics = model.step(batch, config.loss)
            clock.lap("train")
            run.log(step, {**metrics, **measured, **clock.laps})
    run.finish(model, {"records": len(records)}, evaluate=evaluation.at_end)


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """chosen, rejected, chosen, rejected, ...; `group` is the pair."""
    batch = batch_of([example for pair in pairs for example in pair])
    return batch.with_columns(sequences={"group": np.repeat(np.arange(len(pairs)), 2)})
