"""Preference optimisation without sampling and without a reward model: DPO and its kin.

The reference is the model before its training; SimPO and ORPO have none.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from align_core.config import DpoConfig, TrainerConfig
from align_core.data.dataset import Dataset, check_each, encoded
from align_core.data.examples import Pair, batch_of, encode_pair
from align_core.data.prefetch import prefetched
from align_core.data.records import PreferenceRecord, read_preferences
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.preflight import open_tokenizer
from align_core.stages.reference import Reference, References, with_reference
from align_core.stages.run import Run
from align_core.stages.world import World
from align_core.types import Batch


def run_dpo(config: DpoConfig, world: World) -> None:
    """Trains `config.model` on the preferences in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    tokenizer = open_tokenizer(config.model, template=config.template, max_length=config.max_length)
    encode = partial(encode_pair, tokenizer, template=config.template, max_length=config.max_length)
    records = read_preferences(config.data)
    held_out = read_preferences(config.eval_data) if config.eval_data else None
    order = records.order(batch_size=config.batch_size, seed=config.seed)
    for part in (records, held_out):
        if part is not None:
            check_each(part, encode)
    run = Run(config, data={"data": records} | ({"eval_data": held_out} if held_out else {}))
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
    with prefetched(lambda step: pairs_of(records, order(step).tolist()), steps=config.steps) as batches:
        for step in run.steps(model):
            clock = Clock()
            measured = evaluation.before(step)
            clock.lap("evaluate")
            batch = batches(step)
            clock.lap("data")
            batch = with_reference(references.get("data"), order(step).tolist(), batch)
            clock.lap("reference")
            metrics = model.step(batch, config.loss)
            clock.lap("train")
            run.log(step, {**metrics, **measured, **clock.laps})
    run.finish(model, {"records": len(records), **evaluation.at_end()})


def pair_batch(pairs: Sequence[Pair]) -> Batch:
    """chosen, rejected, chosen, rejected, ...; `group` is the pair."""
    batch = batch_of([example for pair in pairs for example in pair])
    return batch.with_columns(sequences={"group": np.repeat(np.arange(len(pairs)), 2)})
