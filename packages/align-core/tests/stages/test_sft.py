"""SFT hands the right batches to the trainer, and the policy learns what they say."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


def test_chat_template_that_ends_turns_in_another_token_is_told_at_the_start(
    tmp_path: Path,
    make_config: Callable[..., SftConfig],
    fake_world: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tmp_path / "chatty"
    shutil.copytree(make_config("sft").model, model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}<s>{% endfor %}")
    run_sft(make_config("sft", model=model, template="plain", out="plain"), fake_world())
    assert "closes an assistant's turn" not in caplog.text
    run_sft(make_config("sft", model=model, template="auto", out="chat"), fake_world())
    assert "closes an assistant's turn with '<s>', at which" in caplog.text
