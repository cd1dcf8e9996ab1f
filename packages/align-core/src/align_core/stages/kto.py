"""KTO: learning from single responses that are marked as wanted or not (Ethayarajh et al. 2024, arXiv:2402.01306).

Its baseline is the model's KL to the reference, estimated in every step on prompts of the batch with the response of
another record (section 4.2): those sequences are scored, not learnt.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from align_core.config import KtoConfig, TrainerConfig
from align_core.data.dataset import Dataset, encoded
from align_core.data.examples import Example, batch_of, encode_example
from align_core.data.prefetch import prefetched
from align_core.data.records import Content, MarkedRecord, read_marked
from align_core.errors import DataError
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.offline import OfflineData, open_data
from align_core.stages.preflight import open_tokenizer
from align_core.stages.reference import MakeBatch, Reference, References, with_reference
from align_core.stages.world import Model, World
from align_core.types import Batch


class Marked(NamedTuple):
    """A record as tokens."""

    prompt: Content
    """As in the record: two sequences of one prompt may have been cut differently."""
    example: Example
    desirable: bool
    """Whether the response is wanted."""


def open_kto(config: KtoConfig) -> OfflineData[MarkedRecord, Marked]:
    """The data as it is trained on.

    Raises:
        DataError: a single held-out record, which leaves no other for its baseline; and what `open_tokenizer` and
            `open_data` raise.
    """
    tokenizer = open_tokenizer(config)

    def encode(record: MarkedRecord) -> Marked:
        example = encode_example(
            tokenizer, record.prompt, record.response, template=config.template, max_length=config.max_length
        )
        return Marked(record.prompt, example, record.desirable)

    data = open_data(config, read_marked, encode, lambda marked: [marked.example])
    if data.held_out is not None and len(data.held_out) < 2:
        raise DataError(f"{data.held_out.where(0)} is the only held-out record; KTO's KL baseline needs two or more")
    return data


def run_kto(config: KtoConfig, world: World) -> None:
    """Trains `config.model` on the marked responses in `config.data`; the result is a Megatron checkpoint."""
    data = open_kto(config)
    records, held_out, order, encode = data.records, data.held_out, data.order, data.encode
    held_out_parts = _parts(held_out, config.batch_size)
    run = data.run(config)
    if run.finished:
        return

    def batch_at(source: Dataset[MarkedRecord], indices: Sequence[int]) -> Batch:
        return marked_batch([encoded(source, i, encode) for i in indices], max_length=config.max_length)

    def batch_of_step(step: int) -> Batch:
        return batch_at(records, order(step).tolist())

    def held_out_batch(part: int) -> Batch:
        assert held_out is not None
        return batch_at(held_out, held_out_parts[part])

    model = world.trainer(TrainerConfig.of_stage(config))
    references = References(config, world, model)
    reference = references.of("data", range(config.steps), batch_of_step)

    evaluation = Evaluation(config, model, None)
    if held_out:
        of_held_out = references.of("eval_data", range(len(held_out_parts)), held_out_batch)
        evaluation = Evaluation(
            config, model, partial(_measure, model, config, of_held_out, held_out_parts, held_out_batch)
        )
    with prefetched(batch_of_step, steps=config.steps) as batches:
        for step in run.steps(model):
            clock = Clock()
            measured = evaluation.before(step)
            clock.lap("evaluate")
            batch = batches(step)
            clock.lap("data")
            batch = with_reference(reference, [step], batch)
            clock.lap("reference")
            matched, kl = split_off_baseline(model, batch)
            clock.lap("baseline")
            metrics = _means(model.step(matched, config.loss))
            clock.lap("train")
            run.log(step, {**metrics, "kl": kl, **measured, **clock.laps})
    run.finish(model, {"records": len(records)}, evaluate=evaluation.at_end)


def marked_batch(rows: Sequence[Marked], *, max_length: int) -> Batch:
    """The sequences of the rows, then the prompt of each with another's response; `desirable` as 0 or 1.

    The other is the nearest row before whose prompt differs; before the first row stands the last. Where all rows have
    one prompt it is the row before.
    """
    matched = [row.example for row in rows]
    mismatched = [_mismatched(row.example, _other(rows, i), max_length) for i, row in enumerate(rows)]
    desirable = np.asarray([row.desirable for row in rows] * 2, dtype=np.bool_)
    return batch_of([*matched, *mismatched]).with_columns(sequences={"desirable": desirable})


def split_off_baseline(model: Model, batch: Batch) -> tuple[Batch, float]:
    """The first half of a `marked_batch`, with the column `kl`: the mean log-ratio of the second half, at least 0."""
    half = len(batch) // 2
    mismatched = batch.select(np.arange(half, len(batch)))
    reference = mismatched.token_column("reference_logprobs").astype(np.float64)
    ratio = np.where(mismatched.mask, model.logprobs(mismatched) - reference, 0.0)
    kl = max(0.0, float(ratio.sum() / half))
    matched = batch.select(np.arange(half))
    return matched.with_columns(sequences={"kl": np.full(half, kl, np.float32)}), kl


def _other(rows: Sequence[Marked], own: int) -> Example:
    before = (rows[own - back] for back in range(1, len(rows)))
    return next((row for row in before if row.prompt != rows[own].prompt), rows[own - 1]).example


def _mismatched(own: Example, other: Example, max_length: int) -> Example:
    """The prompt of one with the response of another, which is cut at the right to fit."""
    prompt, answer = own.tokens[~own.mask], other.tokens[other.mask]
    answer = answer[: max(1, max_length - len(prompt))]
    tokens = np.concatenate([prompt, answer])
    return Example(tokens=tokens, mask=np.arange(len(tokens)) >= len(prompt))


def _parts(held_out: Dataset[MarkedRecord] | None, batch_size: int) -> list[list[int]]:
    """Held-out records in batches of about the size of training's, none of them alone: a baseline needs two.

    Shuffled, as files hold the responses of a prompt one after another; always alike, so that runs can be compared.
    """
    if held_out is None:
        return []
    number = max(1, len(held_out) // batch_size)
    shuffled = np.random.default_rng(0).permutation(len(held_out))
    return [part.tolist() for part in np.array_split(shuffled, number)]


def _measure(
    model: Model,
    config: KtoConfig,
    reference: Reference,
    parts: Sequence[Sequence[int]],
    make_batch: MakeBatch,
) -> dict[str, float]:
    found = []
    for number, part in enumerate(parts):
        matched, kl = split_off_baseline(model, with_reference(reference, [number], make_batch(number)))
        found.append(({**model.evaluate(matched, config.loss), "kl": kl}, len(part)))
    return {f"eval_{name}": value for name, value in _means(mean_over(found, prefix="")).items()}


def _means(metrics: Mapping[str, float]) -> dict[str, float]:
    """The rewards of both kinds, which a loss gives as sums over all responses, as means over their kind."""
    share = metrics["desirable"]
    result = dict(metrics)
    for name, part in (("desirable_reward", share), ("undesirable_reward", 1.0 - share)):
        total = result.pop(name)
        if part > 0:
            result[name] = total / part
    return result
