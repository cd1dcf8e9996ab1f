"""What advantages, shaping, KL estimates and off-policy corrections must obey: all that comes before a loss.

One batch of six sequences in three groups is shuffled group by group, cut in two and padded with tokens outside the
mask; the value of every token must stay what it was. Whitening gets the moments of the whole batch. A new function of
these modules cannot skip this: `test_every_public_function_is_here`. Values by hand are in each module's own tests.
"""

import inspect
from collections.abc import Callable, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import align_algos
from align_algos import (
    Correction,
    InputError,
    clip_scores,
    gae,
    group_normalised,
    k1,
    k2,
    k3,
    kl_estimate,
    last_token,
    leave_one_out,
    masked_importance,
    merge_moments,
    mixed_groups,
    moments,
    negative_sequence_mask,
    ngram_penalty,
    overlong_penalty,
    per_token,
    returns_to_go,
    rewards_with_kl,
    segment_lengths,
    shaped_rewards,
    truncated_importance,
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

NUM_TOKENS = int(WHOLE["mask_N"].sum())


def carried_scores(x: Batch) -> Tensor:
    """A score without a token to carry it is refused, so those of sequences with an empty mask are 0."""
    return torch.where(segment_lengths(x["mask_N"], x["offsets"]) > 0, x["scores_B"], 0.0)


def truncated(x: Batch, level: str) -> Correction:
    numbers = {"num_tokens": NUM_TOKENS, "level": level, "cap": 1.1}
    return truncated_importance(x["a_N"], x["b_N"], x["mask_N"], x["offsets"], **numbers)


def kept(x: Batch, level: str) -> Correction:
    return masked_importance(x["a_N"], x["b_N"], x["mask_N"], x["offsets"], num_tokens=NUM_TOKENS, level=level)


def not_dropped(x: Batch) -> Correction:
    columns = (x["a_N"], x["b_N"], x["c_N"], x["mask_N"], x["offsets"])
    return negative_sequence_mask(*columns, num_tokens=NUM_TOKENS, threshold=0.1)


CORRECTIONS: Mapping[str, Callable[[Batch], Correction]] = {
    "truncated_importance-token": lambda x: truncated(x, "token"),
    "truncated_importance-sequence": lambda x: truncated(x, "sequence"),
    "truncated_importance-geometric": lambda x: truncated(x, "geometric"),
    "masked_importance-token": lambda x: kept(x, "token"),
    "masked_importance-sequence": lambda x: kept(x, "sequence"),
    "masked_importance-geometric": lambda x: kept(x, "geometric"),
    "negative_sequence_mask": not_dropped,
}

# Each gives a value per token; those per sequence are spread over its tokens. The name before "-" is the function's.
FUNCTIONS: Mapping[str, Callable[[Batch], Tensor]] = {
    "k1": lambda x: k1(x["a_N"], x["b_N"]),
    "k2": lambda x: k2(x["a_N"], x["b_N"]),
    "k3": lambda x: k3(x["a_N"], x["b_N"]),
    "kl_estimate": lambda x: kl_estimate(x["a_N"], x["b_N"], estimator="k3"),
    "clip_scores": lambda x: per_token(clip_scores(x["scores_B"], bias=0.5, limit=1.0), x["offsets"]),
    "overlong_penalty": lambda x: per_token(
        overlong_penalty(segment_lengths(x["mask_N"], x["offsets"]), max_tokens=4, buffer=3), x["offsets"]
    ),
    "rewards_with_kl": lambda x: rewards_with_kl(
        carried_scores(x), x["b_N"], x["mask_N"], x["offsets"], kl_coef=0.1, length_normalised=True
    ),
    **{name: lambda x, run=run: run(x).weights_N for name, run in CORRECTIONS.items()},
    "gae": lambda x: gae(x["rewards_N"], x["b_N"], x["mask_N"], x["offsets"], gamma=0.9, lam=0.8).advantages_N,
    "gae-returns": lambda x: gae(x["rewards_N"], x["b_N"], x["mask_N"], x["offsets"], gamma=0.9, lam=0.8).returns_N,
    "returns_to_go": lambda x: returns_to_go(x["rewards_N"], x["mask_N"], x["offsets"], gamma=0.9),
    "group_normalised": lambda x: per_token(group_normalised(x["scores_B"], x["group_B"]), x["offsets"]),
    "group_normalised-centred": lambda x: per_token(
        group_normalised(x["scores_B"], x["group_B"], std=False), x["offsets"]
    ),
    "leave_one_out": lambda x: per_token(leave_one_out(x["scores_B"], x["group_B"]), x["offsets"]),
    "mixed_groups": lambda x: per_token(mixed_groups(x["scores_B"], x["group_B"]).double(), x["offsets"]),
    "whiten": lambda x: whiten(x["a_N"], x["mask_N"], STATISTICS, eps=1e-8),
    "shaped_rewards": lambda x: shaped_rewards(
        carried_scores(x),
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

ZERO_OUTSIDE = {"gae", "gae-returns", "returns_to_go", "whiten", "shaped_rewards", "rewards_with_kl", "last_token"}
ZERO_OUTSIDE |= set(CORRECTIONS)

# All others are constants of the losses.
DIFFERENTIABLE = {"k1", "k2", "k3", "kl_estimate", "last_token"}

# Have no value per token: moments (test_moments_merge); their input is the whole of it.
ELSEWHERE = {"moments", "merge_moments"}


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
    return batch, origin


every_function = pytest.mark.parametrize("name", FUNCTIONS)


def test_every_public_function_is_here() -> None:
    modules = tuple(f"align_algos.{name}" for name in ("advantages", "shaping", "kl", "correction", "statistics"))
    public = {
        key
        for key in align_algos.__all__
        if inspect.isfunction(value := getattr(align_algos, key)) and value.__module__.startswith(modules)
    }
    assert public == {name.split("-")[0] for name in FUNCTIONS} | ELSEWHERE


@every_function
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


def test_moments_merge() -> None:
    """The statistics of any cut are those of the whole."""
    parts = [take(sequences, 1)[0] for sequences in ([4, 0], [2], [1, 3, 5])]
    assert_close(merge_moments([moments(part["a_N"], part["mask_N"]) for part in parts]), STATISTICS)


@pytest.mark.parametrize("name", CORRECTIONS)
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(GROUPS), cut=st.integers(0, 3), padding=st.integers(0, 2))
def test_mismatch_metrics_add_up(name: str, order: list[list[int]], cut: int, padding: int) -> None:
    expected = CORRECTIONS[name](WHOLE).metrics
    assert 0 < expected["corrected_fraction"] < 1
    parts = [take([b for group in part for b in group], padding)[0] for part in (order[:cut], order[cut:])]
    first, second = (CORRECTIONS[name](part).metrics for part in parts)
    assert_close({key: first[key] + second[key] for key in expected}, expected)


@every_function
def test_values_outside_the_mask_change_nothing(name: str) -> None:
    """1e30 outside the mask; rewards there are an error of their own."""
    outside = ~WHOLE["mask_N"]
    spoiled = {key: torch.where(outside, 1e30, x) if key in ("a_N", "b_N", "c_N") else x for key, x in WHOLE.items()}
    assert torch.equal(FUNCTIONS[name](spoiled)[~outside], FUNCTIONS[name](WHOLE)[~outside])


@every_function
@pytest.mark.parametrize("scale", [30.0, -30.0, 1e4, -1e4])
def test_extremes_are_finite(name: str, scale: float) -> None:
    batch = {key: scale * x.float() if x.is_floating_point() else x for key, x in WHOLE.items()}
    assert torch.isfinite(FUNCTIONS[name](batch)).all()


@every_function
def test_no_sequence_an_empty_mask_and_one_token(name: str) -> None:
    """Nothing gives nothing; a mask of False gives 0 where 0 is promised; the sequence of one token is a batch."""
    assert FUNCTIONS[name](take([], 0)[0]).shape == (0,)
    masked = WHOLE | {"mask_N": torch.zeros_like(WHOLE["mask_N"]), "rewards_N": torch.zeros_like(WHOLE["rewards_N"])}
    values = FUNCTIONS[name](masked)
    assert torch.isfinite(values).all()
    assert name not in ZERO_OUTSIDE or not values.any()
    one = take([LENGTHS.index(1)], 0)[0]
    one["mask_N"][:] = True
    value = FUNCTIONS[name](one)
    assert value.shape == (1,) and torch.isfinite(value).all()


@every_function
def test_gradients_equal_finite_differences_or_there_are_none(name: str) -> None:
    leaves = {key: x.clone().requires_grad_() for key, x in WHOLE.items() if x.is_floating_point()}
    if name not in DIFFERENTIABLE:
        assert not FUNCTIONS[name](WHOLE | leaves).requires_grad
        return
    for key, leaf in leaves.items():
        if FUNCTIONS[name](WHOLE | {key: leaf}).requires_grad:
            assert torch.autograd.gradcheck(lambda x, key=key: FUNCTIONS[name](WHOLE | {key: x}), (leaf,))


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("ngram_penalty", "overlong_penalty")])
def test_nan_is_refused_by_name(name: str) -> None:
    batch, _ = take(list(range(len(LENGTHS))), 0)
    spoiled = {key: torch.full_like(x, torch.nan) if x.is_floating_point() else x for key, x in batch.items()}
    with pytest.raises(InputError, match=r"_[NB] holds nan at position"):
        FUNCTIONS[name](spoiled)
