"""Direct preference optimisation: no sampling, no reward model; the reference is the model before its training."""

import logging
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.config import DpoConfig, TrainerConfig
from align_core.data.examples import Example, batch_of, encode_example
from align_core.data.order import indices_of_step
from align_core.data.records import read_preferences
from align_core.stages.run import Run
from align_core.stages.world import Model, World
from align_core.text import load_tokenizer
from align_core.types import Batch

logger = logging.getLogger(__name__)

_REFERENCE_PAIRS = 64  # pairs scored at once for the reference; bounds the driver's memory, changes no result


def run_dpo(config: DpoConfig, world: World) -> None:
    """Trains `config.model` on the preferences in `config.data`; the result is a Megatron checkpoint in OUT/model."""
    tokenizer = load_tokenizer(config.model)
    pairs = [
        tuple(
            encode_example(tokenizer, record.prompt, text, template=config.template, max_length=config.max_length)
            for text in (record.chosen, record.rejected)
        )
        for record in read_preferences(config.data)
    ]
    run = Run(config)
    if run.finished:
        return
    model = world.trainer(TrainerConfig.of_stage(config))
    order = partial(indices_of_step, records=len(pairs), batch_size=config.batch_size, seed=config.seed)
    used = np.unique([order(step) for step in range(config.steps)])
    reference = _reference_logprobs(model, pairs, used, run.out / "checkpoints" / "reference_logprobs.npz")
    for step in run.steps(model):
        chosen = order(step)
        columns = {"reference_logprobs": np.concatenate([reference[i] for i in chosen])}
        batch = _batch([pairs[i] for i in chosen]).with_columns(tokens=columns)
        run.log(step, model.step(batch, config.loss))
    run.finish(model, {"records": len(pairs)})


def _batch(pairs: list[tuple[Example, ...]]) -> Batch:
    """chosen, rejected, chosen, rejected, ...; `group` is the pair."""
    batch = batch_of([example for pair in pairs for example in pair])
    return batch.with_columns(sequences={"group": np.repeat(np.arange(len(pairs)), 2)})


def _reference_logprobs(
    model: Model, pairs: list[tuple[Example, ...]], used: NDArray[np.int64], cache: Path
) -> dict[int, NDArray[np.float32]]:
    """The untrained model's log-probs of the pairs `used` (float32, both responses end to end), by the pair's index.

    Computed once: the file is written before the first update, so a continued run reads what the untrained model said.
    """
    lengths = [sum(len(example.tokens) for example in pairs[i]) for i in used]
    if not cache.exists():
        logger.info("scoring %d pairs with the reference", len(used))
        parts = [
            model.logprobs(_batch([pairs[i] for i in used[first : first + _REFERENCE_PAIRS]]))
            for first in range(0, len(used), _REFERENCE_PAIRS)
        ]
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name("." + cache.name)
        np.savez(temporary, logprobs=np.concatenate(parts))
        temporary.replace(cache)
    with np.load(cache, allow_pickle=False) as file:
        return dict(zip(used.tolist(), np.split(file["logprobs"], np.cumsum(lengths)[:-1])))
