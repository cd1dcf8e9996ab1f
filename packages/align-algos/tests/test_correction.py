"""Off-policy correction, worked by hand, and its metrics."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from align_algos import InputError, masked_importance, negative_sequence_mask, truncated_importance

# Two sequences of 2 sampled tokens (and one that was not sampled): trainer / engine ratios 4, 1/2 and 1, 8.
MASK = torch.tensor([True, True, False, True, True])
OFFSETS = torch.tensor([0, 3, 5])
ROLLOUT = torch.tensor([-3.0, -2.0, -1.0, -2.0, -4.0])
OLD = ROLLOUT + torch.tensor([4.0, 0.5, 100.0, 1.0, 8.0]).log()
COLUMNS = (OLD, ROLLOUT, MASK, OFFSETS)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [3.0, 0.5, 0.0, 1.0, 3.0]),
        ("sequence", [2.0, 2.0, 0.0, 3.0, 3.0]),  # products 2 and 8
        ("geometric", [math.sqrt(2.0), math.sqrt(2.0), 0.0, math.sqrt(8.0), math.sqrt(8.0)]),
    ],
)
def test_truncated_importance_by_hand(level: str, expected: list[float]) -> None:
    output = truncated_importance(*COLUMNS, num_tokens=4, level=level, cap=3.0)
    assert_close(output.weights_N, torch.tensor(expected))


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("token", [0.0, 0.5, 0.0, 1.0, 0.0]),  # IcePop: 4 and 8 are beyond 3
        ("sequence", [2.0, 2.0, 0.0, 0.0, 0.0]),
        ("geometric", [math.sqrt(2.0), math.sqrt(2.0), 0.0, math.sqrt(8.0), math.sqrt(8.0)]),
    ],
)
def test_masked_importance_by_hand(level: str, expected: list[float]) -> None:
    output = masked_importance(*COLUMNS, num_tokens=4, level=level, low=0.5, high=3.0)
    assert_close(output.weights_N, torch.tensor(expected))
    mask_alone = masked_importance(*COLUMNS, num_tokens=4, level=level, low=0.5, high=3.0, keep_ratio=False)
    assert_close(mask_alone.weights_N, (torch.tensor(expected) > 0).float())


def test_negative_sequences_far_off_are_dropped() -> None:
    """Mean log engine - log policy: -ln 2 / 2 and -ln 8 / 2. Turned round, 0.347 and 1.040 nats: beyond 0.5 only the
    second, and only when its advantage is negative."""
    columns = (ROLLOUT, OLD)
    for advantage, expected in ((-1.0, [1.0, 1.0, 0.0, 0.0, 0.0]), (1.0, [1.0, 1.0, 0.0, 1.0, 1.0])):
        output = negative_sequence_mask(
            *columns, torch.full((5,), advantage), MASK, OFFSETS, num_tokens=4, threshold=0.5
        )
        assert_close(output.weights_N, torch.tensor(expected))


def test_metrics_by_hand() -> None:
    """Log-ratios ln 4, -ln 2, 0, ln 8 = ln 2 x (2, -1, 0, 3); weights 3, 0.5, 1, 3 with cap 3; two of four were cut.

    mean |.| = 6 ln 2 / 4 = 1.039721; k3: (4 + 0.5 + 1 + 8 - 4 - 4 ln 2) / 4 = 1.681853.
    """
    metrics = truncated_importance(*COLUMNS, num_tokens=4, cap=3.0).metrics
    expected = {
        "mismatch_abs": 1.039721,
        "mismatch_kl": 1.681853,
        "corrected_fraction": 0.5,
        "weight": 1.875,
        "weight_square": (9 + 0.25 + 1 + 9) / 4,
    }
    assert_close(metrics, {key: torch.tensor(value) for key, value in expected.items()})


def test_the_same_policy_gets_weight_one() -> None:
    for level in ("token", "sequence", "geometric"):
        for output in (
            truncated_importance(OLD, OLD, MASK, OFFSETS, num_tokens=4, level=level),
            masked_importance(OLD, OLD, MASK, OFFSETS, num_tokens=4, level=level),
        ):
            assert torch.equal(output.weights_N, MASK.float())
            assert output.metrics["corrected_fraction"] == 0.0 == output.metrics["mismatch_kl"]


@pytest.mark.parametrize("log_ratio", [30.0, -30.0, 1e4, -1e4])
def test_extremes_are_finite(log_ratio: float) -> None:
    for level in ("token", "sequence", "geometric"):
        columns = (ROLLOUT + log_ratio, ROLLOUT, MASK, OFFSETS)
        truncated = truncated_importance(*columns, num_tokens=4, level=level, cap=2.0)
        masked = masked_importance(*columns, num_tokens=4, level=level)
        assert_close(
            truncated.weights_N, MASK * (2.0 if log_ratio > 0 else math.exp(max(log_ratio, -100))), atol=1e-9, rtol=0
        )
        assert not masked.weights_N.any()
        for output in (truncated, masked):
            assert torch.isfinite(torch.stack(list(output.metrics.values()))).all()


def test_nothing_has_a_gradient() -> None:
    old = OLD.clone().requires_grad_()
    output = truncated_importance(old, ROLLOUT, MASK, OFFSETS, num_tokens=4)
    assert not output.weights_N.requires_grad
    assert not any(value.requires_grad for value in output.metrics.values())


def test_empty_mask_and_empty_batch() -> None:
    nothing = torch.zeros(5, dtype=torch.bool)
    output = truncated_importance(OLD, ROLLOUT, nothing, OFFSETS, num_tokens=0)
    assert not output.weights_N.any() and output.metrics["mismatch_abs"] == 0.0
    empty = torch.zeros(0)
    output = masked_importance(empty, empty, empty.bool(), torch.tensor([0]), num_tokens=9)
    assert output.weights_N.shape == (0,)


@given(st.permutations([0, 1, 2, 3]), st.integers(0, 4), st.sampled_from(["token", "sequence", "geometric"]))
def test_any_split_and_order_of_sequences_gives_the_same(order: list[int], cut: int, level: str) -> None:
    """Four sequences of lengths 0 to 3, shuffled and cut in two: same weights, metrics add up."""
    random = torch.Generator().manual_seed(3)
    old, rollout = (torch.randn(6, generator=random, dtype=torch.float64) for _ in range(2))
    mask, bounds = torch.tensor([True, True, False, True, True, True]), [0, 0, 1, 3, 6]

    def run(sequences: list[int]) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
        tokens = [t for b in sequences for t in range(bounds[b], bounds[b + 1])]
        offsets = torch.tensor([0, *(bounds[b + 1] - bounds[b] for b in sequences)]).cumsum(0)
        output = truncated_importance(old[tokens], rollout[tokens], mask[tokens], offsets, num_tokens=5, level=level)
        return dict(zip(tokens, output.weights_N.tolist())), output.metrics

    weights, metrics = run([0, 1, 2, 3])
    parts = [run(order[:cut]), run(order[cut:])]
    assert parts[0][0] | parts[1][0] == pytest.approx(weights)
    for key, value in metrics.items():
        assert_close(parts[0][1][key] + parts[1][1][key], value)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"level": "word"}, r"level is 'word'; choose one of \['geometric', 'sequence', 'token'\]"),
        ({"cap": 0.5}, "cap is 0.5; expected a finite number in"),
        ({"num_tokens": 3}, "num_tokens is 3, but this micro-batch alone has 4"),
    ],
)
def test_wrong_numbers_are_refused(numbers: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        truncated_importance(*COLUMNS, **{"num_tokens": 4} | numbers)


@pytest.mark.parametrize("threshold", [0.0, -0.1, float("nan")])
def test_a_threshold_that_is_not_positive_is_refused(threshold: float) -> None:
    with pytest.raises(InputError, match=r"threshold is (0|-0.1|nan); expected"):
        negative_sequence_mask(*COLUMNS[:2], OLD, MASK, OFFSETS, num_tokens=4, threshold=threshold)


def test_nan_is_refused_by_name() -> None:
    spoiled = torch.where(MASK, torch.nan, OLD)
    with pytest.raises(InputError, match="old_logprobs_N holds nan"):
        truncated_importance(spoiled, ROLLOUT, MASK, OFFSETS, num_tokens=4)
    with pytest.raises(InputError, match="rollout_logprobs_N holds nan"):
        masked_importance(OLD, spoiled, MASK, OFFSETS, num_tokens=4)
