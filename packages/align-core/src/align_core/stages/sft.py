"""Supervised fine-tuning: cross-entropy on what the assistant says, averaged over all such tokens of the batch."""

from align_core.config import SftConfig, TrainerConfig
from align_core.data.dataset import encoded
from align_core.data.examples import Example, batch_of, encode_sft
from align_core.data.prefetch import prefetched
from align_core.data.records import SftRecord, read_sft
from align_core.stages.clock import Clock
from align_core.stages.held_out import Evaluation, mean_over
from align_core.stages.offline import OfflineData, open_data
from align_core.stages.preflight import open_tokenizer
from align_core.stages.world import World
from align_core.types import Batch


def open_sft(config: SftConfig) -> OfflineData[SftRecord, Example]:
    """The data as it is trained on; raises what `open_tokenizer` and `open_data` raise."""
    tokenizer = open_tokenizer(config)

    def encode(record: SftRecord) -> Example:
        return encode_sft(
            tokenizer, record, template=config.template, max_length=config.max_length, turns=config.loss.turns
        )

    return open_data(config, read_sft, encode, lambda example: [example])


def run_sft(config: SftConfig, world: World) -> None:
    """Trains `config.model` on `config.data`; the result is a Megatron checkpoint in OUT/model."""
    data = open_sft(config)
    records, held_out, order, encode = data.records, data.held_out, data.order, data.encode
    run = data.run(config)
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
    run.finish(model, {"records": len(records)}, evaluate=evaluation.at_end)
