"""What everything that turns rewards into token values must obey: the same whatever the order, the cut and the padding.

One batch of six sequences in three groups is shuffled group by group, cut in two and padded with tokens outside the
mask; the value of every token must stay what it was. Whitening gets the moments of the whole batch.
"""

from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align_algos import (
    InputError,
    Moments,
    gae,
    group_normalised,
    last_token,
    leave_one_out,
    mixed_groups,
    moments,
    ngram_penalty,
    per_token,
    returns_to_go,
    shaped_rewards,
    whiten,
)

LENGTHS = [3, 0, 5, 1, 4, 2]
GROUPS = [[0, 3], [1, 2, 5], [4]]
Batch = dict[str, Tensor]


def make_batch() -> Batch:
    random = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    batch = {f"{name}_N": torch.randn(total, generator=random, dtype=torch.float64) for name in ("a", "b", "c")}
    batch["mask_N"] = torch.rand(total, generator=random) < 0.7
    batch["tokens_N"] = torch.randint(0, 3, (total,), generator=random)
    batch["rewards_N"] = torch.where(batch["mask_N"], batch["a_N"], 0.0)
    group = {b: number for number, members in enumerate(GROUPS) for b in members}
    batch["group_B"] = torch.tensor([group[b] for b in range(len(LENGTHS))])
    batch["scores_B"] = torch.tensor([0.5, 0.0, 1.0, -1.0, 2.0, 2.0], dtype=torch.float64)
    batch["offsets"] = torch.tensor([0, *LENGTHS]).cumsum(0)
    return batch


WHOLE = make_batch()
STATISTICS = moments(WHOLE["a_N"], WHOLE["mask_N"])

# Each gives a value per token; those per sequence are spread over its tokens.
FUNCTIONS: Mapping[str, Callable[[Batch], Tensor]] = {
    "gae": lambda x: gae(x["rewards_N"], x["b_N"], x["mask_N"], x["offsets"], gamma=0.9, lam=0.8).advantages_N,
    "returns": lambda x: gae(x["rewards_N"], x["b_N"], x["mask_N"], x["offsets"], gamma=0.9, lam=0.8).returns_N,
    "returns_to_go": lambda x: returns_to_go(x["rewards_N"], x["mask_N"], x["offsets"], gamma=0.9),
    "group_normalised": lambda x: per_token(group_normalised(x["scores_B"], x["group_B"]), x["offsets"]),
    "centred": lambda x: per_token(group_normalised(x["scores_B"], x["group_B"], std=False), x["offsets"]),
    "leave_one_out": lambda x: per_token(leave_one_out(x["scores_B"], x["group_B"]), x["offsets"]),
    "mixed_groups": lambda x: per_token(mixed_groups(x["scores_B"], x["group_B"]).double(), x["offsets"]),
    "whiten": lambda x: whiten(x["a_N"], x["mask_N"], STATISTICS, eps=1e-8),
    "shaped_rewards": lambda x: shaped_rewards(
        torch.where(x["tokens_in_mask_B"] > 0, x["scores_B"], 0.0),
        x["a_N"],
        x["b_N"],
        x["mask_N"],
        x["offsets"],
        kl_coef=0.1,
        length_normalised=True,
    ),
    "last_token": lambda x: last_token(x["scores_B"], x["mask_N"], x["offsets"]),
    "ngram_penalty": lambda x: per_token(ngram_penalty(x["tokens_N"], x["mask_N"], x["offsets"]), x["offsets"]),
}

ZERO_OUTSIDE = {"gae", "returns", "returns_to_go", "whiten", "shaped_rewards", "last_token"}


def take(sequences: list[int], padding: int) -> tuple[Batch, list[int]]:
    """These sequences in this order, each between `padding` tokens outside the mask; and where its tokens were."""
    bounds = WHOLE["offsets"].tolist()
    columns: dict[str, list[Tensor]] = {key: [] for key in WHOLE if key.endswith("_N")}
    origin: list[int] = []
    for b in sequences:
        inside = list(range(bounds[b], bounds[b + 1]))
        origin += [-1] * padding + inside + [-1] * padding
        for key, parts in columns.items():
            filler = torch.full((padding,), 0 if key in ("mask_N", "rewards_N") else 7, dtype=WHOLE[key].dtype)
            parts += [filler, WHOLE[key][inside], filler]
    batch = {key: torch.cat([WHOLE[key][:0], *parts]) for key, parts in columns.items()}
    lengths = torch.tensor([0, *(LENGTHS[b] + 2 * padding for b in sequences)])
    batch |= {key: WHOLE[key][torch.tensor(sequences, dtype=torch.int64)] for key in ("group_B", "scores_B")}
    batch["offsets"] = lengths.cumsum(0)
    batch["tokens_in_mask_B"] = torch.tensor([int(WHOLE["mask_N"][bounds[b] : bounds[b + 1]].sum()) for b in sequences])
    return batch, origin


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(GROUPS), cut=st.integers(0, 3), padding=st.integers(0, 2))
def test_order_cut_and_padding_change_nothing(name: str, order: list[list[int]], cut: int, padding: int) -> None:
    whole, _ = take(list(range(len(LENGTHS))), 0)
    expected = FUNCTIONS[name](whole)
    found = torch.full_like(expected, torch.nan)
    for part in (order[:cut], order[cut:]):
        batch, origin = take([b for group in part for b in group], padding)
        values = FUNCTIONS[name](batch)
        real = torch.tensor([position >= 0 for position in origin], dtype=torch.bool)
        found[torch.tensor(origin, dtype=torch.int64)[real]] = values[real]
        if name in ZERO_OUTSIDE:
            assert not values[~real].any()
    assert_close(found, expected)


def test_moments_add_up() -> None:
    """The statistics of any cut are those of the whole."""
    parts = [take(sequences, 1)[0] for sequences in ([4, 0], [2], [1, 3, 5])]
    added = Moments(*(sum(column) for column in zip(*(moments(part["a_N"], part["mask_N"]) for part in parts))))
    assert_close(added, STATISTICS)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "ngram_penalty"])
def test_nan_is_refused_by_name(name: str) -> None:
    batch, _ = take(list(range(len(LENGTHS))), 0)
    spoiled = {key: torch.full_like(x, torch.nan) if x.is_floating_point() else x for key, x in batch.items()}
    with pytest.raises(InputError, match=r"_[NB] holds nan at position"):
        FUNCTIONS[name](spoiled)
