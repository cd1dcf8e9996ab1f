"""Reward shaping, worked by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from align_algos import (
    InputError,
    RunningScale,
    clip_scores,
    last_token,
    ngram_penalty,
    overlong_penalty,
    rewards_with_kl,
    shaped_rewards,
    token_kl,
)

# Two sequences: prompt, two sampled tokens; prompt, an observation, one sampled token, a token after it.
MASK = torch.tensor([False, True, True, False, False, True, False])
OFFSETS = torch.tensor([0, 3, 7])


def test_clip_scores_by_hand() -> None:
    assert_close(clip_scores(torch.tensor([5.0, -9.0, 1.0]), bias=1.0, limit=3.0), torch.tensor([3.0, -3.0, 0.0]))


def test_last_token_skips_what_was_not_sampled() -> None:
    assert torch.equal(last_token(torch.tensor([2.0, 3.0]), MASK, OFFSETS), torch.tensor([0.0, 0, 2, 0, 0, 3, 0]))


def test_shaped_rewards_by_hand() -> None:
    """KL terms -0.1 x (0.5, -1) and -0.1 x 2; scores 2 and -1 on the last sampled token; nothing elsewhere."""
    logprobs = torch.tensor([-9.0, -1.0, -2.0, -9.0, -9.0, -1.0, -9.0])
    reference = torch.tensor([-1.0, -1.5, -1.0, -1.0, -1.0, -3.0, -1.0])
    columns = (torch.tensor([2.0, -1.0]), logprobs, reference, MASK, OFFSETS)
    expected = torch.tensor([0.0, -0.05, 2.1, 0.0, 0.0, -1.2, 0.0])
    assert_close(shaped_rewards(*columns, kl_coef=0.1), expected)
    halved = torch.tensor([0.0, -0.025, 2.05, 0.0, 0.0, -1.2, 0.0])
    assert_close(shaped_rewards(*columns, kl_coef=0.1, length_normalised=True), halved)


def test_the_exact_kl_as_reward() -> None:
    """p = (1/4, 3/4) against q = (1/2, 1/2) on every token: 0.130812 (worked in test_vocab_kl.py), coefficient 0.1."""
    kl = token_kl(torch.tensor([[0.0, math.log(3.0)]]).expand(7, 2), torch.zeros(7, 2))
    rewards = rewards_with_kl(torch.tensor([2.0, -1.0]), kl, MASK, OFFSETS, kl_coef=0.1)
    expected = torch.tensor([0.0, -0.0130812, 1.9869188, 0.0, 0.0, -1.0130812, 0.0])
    assert_close(rewards, expected)


def test_a_score_without_a_token_to_carry_it_is_refused() -> None:
    nothing = torch.zeros(7, dtype=torch.bool)
    columns = (torch.zeros(7), torch.zeros(7), nothing, OFFSETS)
    assert not shaped_rewards(torch.zeros(2), *columns, kl_coef=0.1).any()
    with pytest.raises(InputError, match="sequence 1 has a score but no token inside mask_N"):
        shaped_rewards(torch.tensor([0.0, 1.0]), *columns, kl_coef=0.1)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 1, 2, 3, 1, 2], -5.0),  # (1 2) three times, 3 apart, gap 3 - 2: 3; trigrams twice, gap at least 1: 2
        ([1, 2, 9, 8, 7, 6, 1, 2], -0.5),  # (1 2) twice, 6 apart, gap 4
        ([4, 4, 4, 4], -5.0),  # (4 4) three times in a row: 3; (4 4 4) twice: 2
        ([1, 2, 3, 4], 0.0),
        ([1], 0.0),
        ([], 0.0),
    ],
)
def test_ngram_penalty_by_hand(tokens: list[int], expected: float) -> None:
    """Tokens outside the mask (here a 1 before and after) neither repeat nor separate."""
    flat = torch.tensor([1, *tokens, 1])
    mask = torch.tensor([False, *[True] * len(tokens), False])
    penalty = ngram_penalty(flat, mask, torch.tensor([0, len(flat)]))
    assert_close(penalty, torch.tensor([expected]))


def test_overlong_penalty_by_hand() -> None:
    """L_max 10, buffer 4: free up to 6, half at 8, -1 from 10 on."""
    penalty = overlong_penalty(torch.tensor([0, 6, 8, 10, 12]), max_tokens=10, buffer=4)
    assert_close(penalty, torch.tensor([0.0, 0.0, -0.5, -1.0, -1.0]))
    with pytest.raises(InputError, match="buffer is 11; expected 1 to max_tokens = 10"):
        overlong_penalty(torch.tensor([1]), max_tokens=10, buffer=11)


def test_running_scale_follows_all_rewards_seen() -> None:
    """Three batches equal one: the ancestor's never updated. Its state survives a checkpoint."""
    rewards = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 100
    scale = RunningScale()
    assert torch.equal(scale.scale(rewards), rewards)
    for batch in (rewards[:1], rewards[1:20], rewards[20:], rewards[:0]):
        scale.update(batch)
    assert abs(scale.std - float(rewards.std(correction=0))) < 1e-9
    restored = RunningScale()
    restored.load_state_dict(scale.state_dict())
    assert_close(restored.scale(rewards), rewards / rewards.std(correction=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("value", "count"), [(0.1, 3), (0.7, 6), (-2.3, 5), (1 / 3, 7)])
def test_running_scale_of_equal_rewards_leaves_them(dtype: torch.dtype, value: float, count: int) -> None:
    """The mean of three times 0.1 in float64 is not 0.1; its spread of 1e-17 must not become a scale. Nor over batches.

    One reward higher by 1 among n: std sqrt(n - 1) / n.
    """
    rewards = torch.full((count,), value, dtype=dtype)
    scale = RunningScale()
    for batch in (rewards, rewards[1:], rewards):
        scale.update(batch)
        assert scale.std == 0.0 and torch.equal(scale.scale(rewards), rewards)
    restored = RunningScale()
    restored.load_state_dict(scale.state_dict())
    assert restored.std == 0.0
    restored.update(rewards[:1] + 1)
    total = 3 * count
    assert abs(restored.std - math.sqrt(total - 1) / total) < 1e-6


def test_running_scale_takes_a_state_without_the_extremes() -> None:
    """Rewards 0 and 2, saved before extremes were kept: std 1; with a third, 4: sqrt(8 / 3)."""
    scale = RunningScale()
    scale.load_state_dict({"count": 2, "mean": 1.0, "square": 2.0})
    assert scale.std == 1.0
    scale.update(torch.tensor([4.0]))
    assert_close(scale.std, math.sqrt(8 / 3))
    scale.load_state_dict({"count": 0, "mean": 0.0, "square": 0.0})
    assert scale.std == 0.0


def test_running_scale_refuses_a_foreign_state() -> None:
    with pytest.raises(InputError, match=r"keys \['coef'\]; expected \['count', 'highest', 'low"):
        RunningScale().load_state_dict({"coef": 1.0})


@pytest.mark.parametrize("function", [clip_scores, RunningScale().update, RunningScale().scale])
def test_nan_is_refused_by_name(function: object) -> None:
    assert callable(function)
    with pytest.raises(InputError, match=r"^(scores|rewards)_B holds nan at position 1"):
        function(torch.tensor([0.0, torch.nan]))
