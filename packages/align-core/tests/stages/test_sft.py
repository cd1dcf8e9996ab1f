"""SFT hands the right batches to the trainer, and the policy learns what they say."""

from collections.abc import Callable
from typing import Any

from align_core.config import SftConfig
from align_core.data.order import indices_of_step
from align_core.stages.sft import run_sft
from align_core.text import load_tokenizer


def test_batches_follow_the_order_and_hold_prompt_and_response(
    make_config: Callable[..., SftConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("sft"), fake_world()
    run_sft(config, world)
    (trainer,) = world.trainers
    assert (trainer.config.head, trainer.config.trainable, trainer.config.steps) == ("lm", True, 6)
    tokenizer = load_tokenizer(config.model)
    for step, batch in enumerate(trainer.seen):
        chosen = indices_of_step(step, records=10, batch_size=4, seed=3)
        texts = [tokenizer.decode(batch.select([i]).tokens) for i in range(len(batch))]
        assert texts == [f"\n\nHuman: What is {n}?\n\nAssistant: {n * n}" for n in chosen]


def test_loss_falls(make_config: Callable[..., SftConfig], fake_world: Callable[..., Any]) -> None:
    config, world = make_config("sft", steps=40, out="long"), fake_world()
    run_sft(config, world)
    batch = world.trainers[0].seen[0]
    before = fake_world().trainer(world.trainers[0].config).logprobs(batch)[batch.mask].mean()
    assert world.trainers[0].logprobs(batch)[batch.mask].mean() > before + 1
