"""KTO learns from single marks, against a baseline of mismatched prompts and responses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from align_core.config import KtoConfig
from align_core.data.examples import Example
from align_core.errors import ConfigError
from align_core.stages.kto import Marked, marked_batch, run_kto, split_off_baseline
from align_core.stages.run import read_metrics
from align_core.types import Batch


def example(prompt: list[int], answer: list[int]) -> Example:
    return Example(
        tokens=np.array([*prompt, *answer], np.int32), mask=np.array([False] * len(prompt) + [True] * len(answer))
    )


ROWS = [
    Marked("a", example([1, 2], [3]), True),
    Marked("b", example([4], [5, 6]), False),
    Marked("c", example([7], [8]), True),
]


def test_second_half_pairs_each_prompt_with_the_response_before() -> None:
    batch = marked_batch(ROWS, max_length=10)
    sequences = [batch.select([i]).tokens.tolist() for i in range(6)]
    assert sequences == [[1, 2, 3], [4, 5, 6], [7, 8], [1, 2, 8], [4, 3], [7, 5, 6]]
    assert batch.sequence_column("desirable").tolist() == [True, False, True] * 2
    assert batch.select([5]).mask.tolist() == [False, True, True]


def test_baseline_takes_the_response_of_another_prompt() -> None:
    """Files hold the wanted and the unwanted response of a prompt one after the other; the second may be cut more."""
    rows = [
        Marked("a", example([1, 2], [3]), True),
        Marked("a", example([2], [4, 4, 4]), False),
        Marked("b", example([5], [6]), True),
        Marked("b", example([5], [7]), False),
    ]
    batch = marked_batch(rows, max_length=10)
    assert [batch.select([i]).tokens.tolist() for i in range(4, 8)] == [[1, 2, 7], [2, 7], [5, 4, 4, 4], [5, 4, 4, 4]]
    same = marked_batch(rows[:2], max_length=10)
    assert [same.select([i]).tokens.tolist() for i in (2, 3)] == [[1, 2, 4, 4, 4], [2, 3]]


def test_held_out_batches_mix_prompts_of_a_file_of_pairs(
    tmp_path: Path, make_config: Callable[..., KtoConfig], fake_world: Callable[..., Any]
) -> None:
    """Ten prompts with two responses each, two records a batch: in file order every batch would have one prompt."""
    held_out = tmp_path / "held_out.jsonl"
    rows = [{"prompt": f"{n}?", "response": str(label), "label": label} for n in range(10) for label in (True, False)]
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config, world = make_config("kto", eval_data=held_out, batch_size=2, steps=1), fake_world()
    run_kto(config, world)
    batches = world.trainers[0].measured[:10]
    pairs = [[batch.select([i]) for i in (0, 1)] for batch in batches]
    same = [np.array_equal(one.tokens[~one.mask], other.tokens[~other.mask]) for one, other in pairs]
    assert sum(same) <= 2


def test_mismatched_response_is_cut_to_fit() -> None:
    batch = marked_batch(ROWS, max_length=2)
    assert [batch.select([i]).tokens.tolist() for i in (3, 5)] == [[1, 2, 8], [7, 5]]


class Constant:
    """Says the same of every token."""

    def __init__(self, value: float) -> None:
        self.value = value

    def logprobs(self, batch: Batch) -> np.ndarray:
        return np.full(len(batch.tokens), self.value, np.float32)


@pytest.mark.parametrize(("value", "kl"), [(-0.5, 2.0), (-3.0, 0.0)])
def test_baseline_by_hand(value: float, kl: float) -> None:
    """Responses of 1, 1 and 2 tokens, reference -2 each: (1 + 1 + 2) (value + 2) / 3, at least 0."""
    batch = marked_batch(ROWS, max_length=10)
    batch = batch.with_columns(tokens={"reference_logprobs": np.full(len(batch.tokens), -2.0, np.float32)})
    matched, found = split_off_baseline(Constant(value), batch)  # type: ignore[arg-type]
    assert found == pytest.approx(kl)
    assert len(matched) == 3
    assert matched.sequence_column("kl").tolist() == pytest.approx([kl] * 3)
    assert matched.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("reference", ["once", "step"])
def test_reference_is_the_untrained_model_either_way(
    reference: str, make_config: Callable[..., KtoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("kto", reference=reference), fake_world()
    run_kto(config, world)
    assert [trainer.config.trainable for trainer in world.trainers] == [True, False][: 1 + (reference == "step")]
    untrained = fake_world().trainer(world.trainers[0].config)
    for batch in world.trainers[0].seen:
        np.testing.assert_array_equal(batch.token_column("reference_logprobs"), untrained.logprobs(batch))


def test_wanted_responses_become_likelier(
    make_config: Callable[..., KtoConfig], fake_world: Callable[..., Any]
) -> None:
    config, world = make_config("kto", steps=60, out="long"), fake_world()
    run_kto(config, world)
    batch = world.trainers[0].seen[-1]
    ratio = np.where(batch.mask, world.trainers[0].logprobs(batch) - batch.token_column("reference_logprobs"), 0)
    sums, wanted = np.add.reduceat(ratio, batch.offsets[:-1]), batch.sequence_column("desirable")
    assert sums[wanted].min() > sums[~wanted].max()


def test_rewards_are_means_of_their_kind(make_config: Callable[..., KtoConfig], fake_world: Callable[..., Any]) -> None:
    """The fake says that half the responses are wanted, with reward sums 0.2 and 0.1 over all of them."""
    config = make_config("kto", eval_data=make_config("kto").data)
    run_kto(config, fake_world())
    line = read_metrics(config.out)[0]
    assert (line["desirable_reward"], line["undesirable_reward"]) == pytest.approx((0.4, 0.2))
    assert (line["eval_desirable_reward"], line["eval_undesirable_reward"]) == pytest.approx((0.4, 0.2))
    assert line["kl"] == line["eval_kl"] == 0.0


def test_batch_of_one_has_no_baseline(make_config: Callable[..., KtoConfig]) -> None:
    with pytest.raises(ConfigError, match="batch_size 1: the KL baseline"):
        make_config("kto", batch_size=1)
