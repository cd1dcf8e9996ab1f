"""Supervised fine-tuning: cross-entropy on what the assistant says, averaged over all such tokens of the batch."""

from align_core.config import SftConfig, TrainerConfig
from align_core.data.dataset import check_each, encoded
from align_core.data.examples import Example, batch_of, encode_sft
from align_core.data.prefetch import prefetched
from align_core.data.records import SftRecord, read_sft
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.preflight import open_tokenizer
from align_core.stages.run import Run
from align_core.stages.world import World
from align_core.types import Batch


def run_sft(config: SftConfig, world: World) -> None:
    """Trains `config.model` on `config.data`; the result is a Megatron checkpoint in OUT/model."""
    tokenizer = open_tokenizer(config.model, template=config.template, max_length=config.max_length)

    def encode(record: SftRecord) -> Example:
        return encode_sft(
            tokenizer, record, template=config.template, max_length=config.max_length, turns=config.loss.turns
        )

    records = read_sft(config.data)
    held_out = read_sft(config.eval_data) if config.eval_data else None
    order = records.order(batch_size=config.batch_size, seed=config.seed)
    for part in (records, held_out):
        if part is not None:
            check_each(part, encode)
    run = Run(config, data={"data": records} | ({"eval_data": held_out} if held_out else {}))
    if run.finished:
        return
    model = world.trainer(TrainerConfig.of_stage(config))

    def prepare(step: int) -> Batch:
        return batch_of([encoded(records, i, encode) for i in order(step)])

    def evaluate() -> dict[str, float]:
        assert held_out is not None
        batches = (batch_of([encode(r) for r in part]) for part in held_out.parts())
        return mean_over((model.evaluate(batch, config.loss), int(batch.mask.sum())) for batch in batches)

    evaluation = Evaluation(config, model, evaluate if held_out else None)
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
    run.finish(model, {"records": len(records), **evaluation.at_end()})
