"""DPO compares with the model as it was before training, whatever was trained, resumed or left behind meanwhile."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from align_core.config import DpoConfig
from align_core.stages.dpo import run_dpo
from align_core.text import load_tokenizer


def test_batches_alternate_chosen_and_rejected_in_groups_of_two(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("dpo"), fake_world()
    run_dpo(config, world)
    tokenizer = load_tokenizer(config.model)
    for batch in world.trainers[0].seen:
        assert batch.sequence_column("group").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        texts = [tokenizer.decode(batch.select([i]).tokens) for i in range(8)]
        assert all(text.endswith(" 99") for text in texts[1::2])
        assert all(a.rpartition(":")[0] == b.rpartition(":")[0] for a, b in zip(texts[::2], texts[1::2]))
        assert all(text.split()[1] == text.split()[-1] for text in texts[::2])


def test_reference_is_the_untrained_model_in_every_step(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("dpo"), fake_world()
    run_dpo(config, world)
    (trainer,) = world.trainers
    untrained = fake_world().trainer(trainer.config)
    for batch in trainer.seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))
    assert not np.array_equal(trainer.logprobs(batch), untrained.logprobs(batch))


def test_reference_scores_only_the_pairs_that_training_uses(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step of 4 pairs of 10, two pairs a call: two calls with four sequences each."""
    monkeypatch.setattr("align_core.stages.reference._AT_ONCE", 4)
    scored: list[int] = []
    world = fake_world()

    def trainer(config: object) -> Any:
        made = type(world).trainer(world, config)
        score = made.logprobs
        made.logprobs = lambda batch: (scored.append(len(batch)), score(batch))[1]
        return made

    world.trainer = trainer
    run_dpo(make_config("dpo", steps=1), world)
    assert scored == [4, 4]


def test_continued_run_reads_the_reference_that_was_kept(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any]
) -> None:
    world = fake_world(crash_at=5)  # logprobs, two steps, save, two steps: the reference is not asked again
    with pytest.raises(Exception, match=r"^step$"):
        run_dpo(make_config("dpo"), world)
    again = fake_world()
    run_dpo(make_config("dpo"), again)
    assert "logprobs" not in again.operations


def test_reference_of_other_settings_is_not_taken(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any]
) -> None:
    """The first run is killed before it saved a step, so the second may have other settings: another order."""
    with pytest.raises(Exception, match=r"^step$"):
        run_dpo(make_config("dpo"), fake_world(crash_at=1))
    config, world = make_config("dpo", seed=4), fake_world()
    run_dpo(config, world)
    untrained = fake_world().trainer(world.trainers[0].config)
    for batch in world.trainers[0].seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))


def test_chosen_responses_become_likelier_than_rejected(
    make_config: Callable[..., DpoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("dpo", steps=60, out="long"), fake_world()
    run_dpo(config, world)
    batch = world.trainers[0].seen[-1]
    sums = np.add.reduceat(
        np.where(batch.mask, world.trainers[0].logprobs(batch) - batch.token_column("reference_logprobs"), 0),
        batch.offsets[:-1],
    )
    assert np.all(sums[::2] > sums[1::2])
