"""Supervised fine-tuning: cross-entropy on the responses, averaged over every response token of the batch."""

from align_core.config import SftConfig, TrainerConfig
from align_core.data.examples import batch_of, sft_examples
from align_core.data.order import indices_of_step
from align_core.data.records import read_sft
from align_core.stages.run import Run
from align_core.stages.world import World
from align_core.text import load_tokenizer


def run_sft(config: SftConfig, world: World) -> None:
    """Trains `config.model` on `config.data`; the result is a Megatron checkpoint in OUT/model."""
    tokenizer = load_tokenizer(config.model)
    records = read_sft(config.data)
    examples = sft_examples(tokenizer, records, template=config.template, max_length=config.max_length)
    run = Run(config)
    if run.finished:
        return
    model = world.trainer(TrainerConfig.of_stage(config))
    for step in run.steps(model):
        chosen = indices_of_step(step, records=len(examples), batch_size=config.batch_size, seed=config.seed)
        metrics = model.step(batch_of([examples[i] for i in chosen]), config.loss)
        run.log(step, metrics)
    run.finish(model, {"records": len(records)})
