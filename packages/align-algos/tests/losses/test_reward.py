"""Values of the Bradley-Terry loss, worked by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from align_algos import InputError, count_pairs, reward_loss


def test_value_by_hand() -> None:
    """One prompt, scores ln 3, 0, 0 with labels 1, 0, 0: two pairs of margin ln 3, the tie makes none.

    -logsigmoid(ln 3) = ln(1 + 1/3) = 0.287682; the mean over two equal pairs is the same. Margin ln 3 = 1.098612.
    """
    scores = torch.tensor([math.log(3.0), 0.0, 0.0])
    output = reward_loss(scores, torch.tensor([1.0, 0.0, 0.0]), torch.tensor([7, 7, 7]), num_pairs=2)
    assert_close(output.loss, torch.tensor(0.287682))
    assert_close(output.metrics, {"accuracy": torch.tensor(1.0), "margin": torch.tensor(1.098612)})


def test_groups_are_never_compared_and_may_interleave() -> None:
    """Groups 0 and 1 interleaved, one pair each, both ranked wrongly by 1: loss ln(1 + e) = 1.313262, accuracy 0.

    Across groups there would be 6 pairs.
    """
    scores = torch.tensor([0.0, 5.0, 1.0, 6.0])
    output = reward_loss(scores, torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 1, 0, 1]), num_pairs=2)
    assert_close(output.loss, torch.tensor(1.313262))
    assert_close(output.metrics["accuracy"], torch.tensor(0.0))
    assert_close(output.metrics["margin"], torch.tensor(-1.0))


def test_fractional_labels_keep_their_order() -> None:
    """Labels 0.5 and 0.25 would be a tie as integers; they are a pair, and integer labels are accepted as well."""
    group = torch.tensor([0, 0])
    assert count_pairs(torch.tensor([0.5, 0.25]), group) == 1
    output = reward_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.25]), group, num_pairs=1)
    same = reward_loss(torch.tensor([1.0, 0.0]), torch.tensor([2, 1]), group, num_pairs=1)
    assert_close(output.loss, torch.tensor(0.313262))
    assert_close(same.loss, output.loss)


def test_labels_of_good_or_bad_are_one_and_zero() -> None:
    group = torch.tensor([0, 0])
    for first, second in ((True, False), (False, True)):
        labels = torch.tensor([first, second])
        assert count_pairs(labels, group) == 1
        columns = (torch.tensor([1.0, 0.0]), labels, group)
        output = reward_loss(*columns, num_pairs=1, margin_scale=0.5)
        assert_close(output, reward_loss(columns[0], labels.float(), group, num_pairs=1, margin_scale=0.5))


def test_all_tied_and_groups_of_one_give_exactly_zero() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    output = reward_loss(scores, torch.zeros(3), torch.tensor([0, 0, 1]), num_pairs=0)
    output.loss.backward()
    assert output.loss == 0.0
    assert torch.equal(scores.grad, torch.zeros(3))


def test_equal_scores_count_as_wrong() -> None:
    """A model that gives every response one score has accuracy 0 and loss ln 2, not accuracy 1."""
    output = reward_loss(torch.ones(2), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), num_pairs=1)
    assert output.metrics["accuracy"] == 0.0
    assert_close(output.loss, torch.tensor(math.log(2.0)))


def test_a_very_wrong_margin_is_linear_and_finite() -> None:
    """-log(sigmoid(-200)) is infinite in float32; logsigmoid gives 200."""
    output = reward_loss(torch.tensor([-100.0, 100.0]), torch.tensor([1.0, 0.0]), torch.tensor([0, 0]), num_pairs=1)
    assert_close(output.loss, torch.tensor(200.0))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([0.0, 0.25, 0.5, 1.0])), max_size=12))
def test_count_pairs_equals_counting_one_by_one(rows: list[tuple[int, float]]) -> None:
    expected = sum(first[0] == second[0] and first[1] > second[1] for first in rows for second in rows)
    groups = torch.tensor([group for group, _ in rows], dtype=torch.int64)
    assert count_pairs(torch.tensor([label for _, label in rows]), groups) == expected


def test_group_ids_must_be_integers() -> None:
    with pytest.raises(InputError, match=r"group_B has dtype torch.float32; expected an integer dtype"):
        reward_loss(torch.ones(2), torch.ones(2), torch.ones(2), num_pairs=1)


def test_margin_and_centring_by_hand() -> None:
    """Scores 2 and 0.5, labels 1 and 0.25, half a point of score for a whole label: x = 1.5 - 0.5 x 0.75 = 1.125.

    ln(1 + e^-1.125) = 0.281150; centring 0.01 x 2.5^2 = 0.0625. The reported margin and accuracy are of the scores.
    """
    columns = (torch.tensor([2.0, 0.5]), torch.tensor([1.0, 0.25]), torch.tensor([3, 3]))
    output = reward_loss(*columns, num_pairs=1, margin_scale=0.5, centre_coef=0.01)
    assert_close(output.loss, torch.tensor(0.343650))
    assert_close(output.metrics["margin"], torch.tensor(1.5))
