"""What every registered loss must obey, checked over the whole registry, so that a new loss cannot skip it.

A batch is made from the loss's own signature: names ending in _N get a value per token, in _B per sequence. A new loss
needs only its keyword numbers in NUMBERS below; without them `test_every_loss_has_numbers` fails. Values by hand are in
the loss's own test file.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align_algos import (
    InputError,
    Loss,
    LossOutput,
    count_pairs,
    count_preferences,
    flatten,
    get_loss,
    loss_names,
    losses,
    padded_offsets,
    register_loss,
)
from align_algos.losses import registry
from pretend_cuda import OnCuda, PretendCuda, on_cuda

CLIP = {"clip_low": 0.2, "clip_high": 0.3}
# One entry for each variant that takes another path through the code.
NUMBERS: dict[str, list[dict[str, Any]]] = {
    "cispo": [CLIP, {"clip_high": 0.5}],
    "dapo": [{}, CLIP],
    "dpo": [{"beta": 0.3, "label_smoothing": 0.1}, {"beta": 0.3, "length_normalised": True}],
    "dr_grpo": [{**CLIP, "kl_coef": 0.1, "length": 6}],
    "entropy": [{"coef": 0.01}],
    "grpo": [
        {**CLIP, "kl_coef": 0.1},
        {**CLIP, "kl_coef": 0.1, "kl_estimator": "k2", "dual_clip": 2.0},
        {**CLIP, "kl_coef": 0.1, "reduction": "sequence_mean"},
        {**CLIP, "kl_coef": 0.1, "reduction": "sequence_sum", "length": 5},
    ],
    "gspo": [{}, CLIP],
    "hinge": [{"beta": 0.3}, {"beta": 0.3, "length_normalised": True}],
    "ipo": [{"beta": 0.3}, {"beta": 0.3, "length_normalised": False}],
    "kl": [{"coef": 0.1, "estimator": "k3"}, {"coef": 0.1, "estimator": "k2"}],
    "kto": [{"beta": 0.3, "kl": 0.2, "desirable_weight": 1.5}, {"beta": 0.3, "kl": -1.0, "undesirable_weight": 0.5}],
    "online_dpo": [
        {"beta": 0.3, "pairs": "all", "length_normalised": True},
        {"beta": 0.3, "pairs": "best_vs_rest"},
        {"beta": 0.3, "pairs": "best_vs_worst", "label_smoothing": 0.1},
    ],
    "orpo": [{"beta": 0.3}],
    "ppo_policy": [CLIP, {**CLIP, "dual_clip": 2.0}, {**CLIP, "reduction": "sequence_mean"}],
    "reinforce_pp": [{"kl_coef": 0.1}],
    "reward": [{}, {"margin_scale": 0.5, "centre_coef": 0.01}],
    "rloo": [{}, CLIP],
    "robust_dpo": [{"beta": 0.3, "label_smoothing": 0.1}],
    "sft": [{}],
    "sft_mixing": [{"coef": 0.5}],
    "simpo": [{"beta": 2.0, "margin": 0.5, "label_smoothing": 0.1}],
    "value": [{"clip": 0.5}, {"clip": None}],
    "vocab_kl": [{"coef": 0.1}],
}
SEQUENCES = 8

# Losses in which a response without a token is still one of a pair, or one response: its loss is that of log-ratio 0
# to the reference. Without a reference such a pair has loss 0.
EMPTY_COUNTS = {"dpo", "hinge", "ipo", "kto", "online_dpo", "robust_dpo"}

# Losses that treat the ratio to the old policy as a constant.
CONSTANT_RATIO = {"cispo"}

Batch = dict[str, Tensor]


class Case:
    """A registered loss with one set of numbers."""

    def __init__(self, name: str, numbers: dict[str, Any]) -> None:
        self.name, self.numbers, self.loss = name, numbers, get_loss(name)
        self.parameters = inspect.signature(self.loss.function).parameters
        self.trained = next(iter(self.parameters))  # the first parameter of a loss is the one it trains
        over_sequences = numbers.get("reduction", "token_mean") != "token_mean"
        self.unit = "sequence" if over_sequences else self.loss.unit
        self.counts = self.loss.counts + (("num_sequences",) if over_sequences else ())

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.numbers.items())])


CASES = [Case(name, numbers) for name in loss_names() for numbers in NUMBERS.get(name, [])]
every_loss = pytest.mark.parametrize("case", CASES, ids=str)


def make_batch(case: Case, seed: int, *, lengths: Tensor | None = None) -> Batch:
    """Float64 tensors for the parameters of the loss; 8 sequences of 0 to 5 tokens, one token each for unit token."""
    random = torch.Generator().manual_seed(seed)
    if lengths is None and case.unit == "token":
        lengths = torch.ones(3 * SEQUENCES, dtype=torch.int64)
    elif lengths is None:
        lengths = torch.randint(0, 6, (SEQUENCES,), generator=random)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    batch: Batch = {"offsets": offsets}
    for parameter in case.parameters:
        length = int(offsets[-1]) if parameter.endswith("_N") else len(lengths)
        if parameter == "mask_N":
            batch[parameter] = torch.rand(length, generator=random) < 0.7
        elif parameter == "group_B":
            batch[parameter] = torch.randint(0, 3, (length,), generator=random)
        elif parameter == "desirable_B":
            batch[parameter] = torch.rand(length, generator=random) < 0.5
        elif parameter in ("labels_B", "rewards_B"):  # few different values, so that there are ties
            batch[parameter] = torch.randint(0, 4, (length,), generator=random) / 2.0
        elif parameter.endswith(("_N", "_B")):
            batch[parameter] = torch.randn(length, generator=random, dtype=torch.float64)
            if "logprobs" in parameter:
                batch[parameter] = -batch[parameter].abs()
            if parameter == "weights_N":
                batch[parameter] = batch[parameter].abs()
    return batch


def global_counts(case: Case, batch: Batch) -> dict[str, int]:
    sequences = len(batch["offsets"]) - 1
    counts = {"num_sequences": sequences, "num_pairs": sequences // 2}
    if "mask_N" in batch:
        counts["num_tokens"] = int(batch["mask_N"].sum())
    if "labels_B" in batch:
        counts["num_pairs"] = count_pairs(batch["labels_B"], batch["group_B"])
    elif "group_B" in batch:
        counts["num_pairs"] = count_preferences(batch["rewards_B"], batch["group_B"], pairs=case.numbers["pairs"])
    return {count: counts[count] for count in case.counts}


def call(case: Case, batch: Batch, counts: dict[str, int]) -> LossOutput:
    tensors = {key: value for key, value in batch.items() if key in case.parameters}
    return case.loss.function(**tensors, **case.numbers, **counts)


def call_with_gradient(case: Case, batch: Batch, counts: dict[str, int]) -> tuple[LossOutput, Tensor]:
    leaf = batch[case.trained].clone().requires_grad_()
    output = call(case, batch | {case.trained: leaf}, counts)
    (gradient,) = torch.autograd.grad(output.loss, leaf)
    return output, gradient


def take(batch: Batch, sequences: list[int]) -> tuple[Batch, Tensor]:
    """The batch of these sequences in this order, and the positions its tokens had."""
    bounds = batch["offsets"].tolist()
    tokens = torch.tensor([t for b in sequences for t in range(bounds[b], bounds[b + 1])], dtype=torch.int64)
    lengths = torch.tensor([bounds[b + 1] - bounds[b] for b in sequences], dtype=torch.int64)
    picked = {"offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])}
    for key, value in batch.items():
        if key.endswith("_N"):
            picked[key] = value[tokens]
        elif key.endswith("_B"):
            picked[key] = value[torch.tensor(sequences, dtype=torch.int64)]
    return picked, tokens


def pieces(batch: Batch, case: Case) -> list[list[int]]:
    """Sequences that must stay together, by the loss's unit."""
    sequences = range(len(batch["offsets"]) - 1)
    if case.unit == "pair":
        return [[b, b + 1] for b in sequences[::2]]
    if case.unit == "group":
        groups = batch["group_B"].tolist()
        return [[b for b in sequences if groups[b] == group] for group in sorted(set(groups))]
    return [[b] for b in sequences]


def test_every_loss_has_numbers() -> None:
    assert sorted(NUMBERS) == loss_names()


def test_every_loss_in_a_file_is_registered() -> None:
    """Any public `*_loss` defined under losses/ must be in the registry, else the tests here would miss it."""
    found = set()
    for module_info in pkgutil.iter_modules(losses.__path__):
        module = importlib.import_module(f"align_algos.losses.{module_info.name}")
        found |= {
            value
            for key, value in vars(module).items()
            if key.endswith("_loss") and key not in ("get_loss", "register_loss") and not key.startswith("_")
        }
    assert found <= {get_loss(name).function for name in loss_names()}


@every_loss
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_any_split_into_micro_batches_gives_the_same_value_and_gradient(case: Case, data: st.DataObject) -> None:
    """Pieces are shuffled and dealt to 3 micro-batches (some may stay empty); outputs add up, gradients line up."""
    batch = make_batch(case, data.draw(st.integers(0, 2**31)))
    counts = global_counts(case, batch)
    whole, gradient = call_with_gradient(case, batch, counts)
    order = data.draw(st.permutations(pieces(batch, case)))
    dealt = data.draw(st.lists(st.integers(0, 2), min_size=len(order), max_size=len(order)))
    rejoined = torch.full_like(gradient, torch.nan)
    parts = []
    for number in range(3):
        sequences = [b for piece, micro in zip(order, dealt) if micro == number for b in piece]
        micro_batch, tokens = take(batch, sequences)
        output, part_gradient = call_with_gradient(case, micro_batch, counts)
        rejoined[tokens if case.trained.endswith("_N") else torch.tensor(sequences, dtype=torch.int64)] = part_gradient
        parts.append(output)
    assert_close(sum(part.loss for part in parts), whole.loss)
    for key, value in whole.metrics.items():
        assert_close(sum(part.metrics[key] for part in parts), value)
    assert_close(rejoined, gradient)


@every_loss
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_padded_tensors_give_the_same_value_and_gradient(case: Case, data: st.DataObject) -> None:
    """Every sequence gets up to 4 positions of padding anywhere, NaN in every column; `flatten` takes them out."""
    batch = make_batch(case, data.draw(st.integers(0, 2**31)))
    lengths = batch["offsets"].diff().tolist()
    width = max(lengths) + 4
    kept = [data.draw(st.sets(st.integers(0, width - 1), min_size=n, max_size=n)) for n in lengths]
    present = torch.tensor([[position in row for position in range(width)] for row in kept])
    keys = [key for key in batch if key.endswith("_N")]
    columns = []
    for key in keys:
        column = torch.full(present.shape, torch.nan if batch[key].is_floating_point() else 1, dtype=torch.float64)
        columns.append(
            column.to(batch[key].dtype).masked_scatter(present, batch[key]).requires_grad_(key == case.trained)
        )
    flat = dict(zip(keys, flatten(present, *columns))) | {"offsets": padded_offsets(present)}
    counts = global_counts(case, batch)
    expected, gradient = call_with_gradient(case, batch, counts)
    assert torch.equal(call(case, batch | flat, counts).loss, expected.loss)
    if case.trained in keys:
        leaf = columns[keys.index(case.trained)]
        (padded_gradient,) = torch.autograd.grad(call(case, batch | flat, counts).loss, leaf)
        assert torch.equal(padded_gradient[present], gradient)
        assert not padded_gradient[~present].any()


@every_loss
def test_gradient_equals_finite_differences(case: Case) -> None:
    batch = make_batch(case, 1)
    counts = global_counts(case, batch)
    leaf = batch[case.trained].clone().requires_grad_()

    def value(x: Tensor) -> Tensor:
        changed = {case.trained: x}
        if case.name in CONSTANT_RATIO:  # move the old policy along, so that the ratio stays as it is
            changed["old_logprobs_N"] = batch["old_logprobs_N"] + (x - batch[case.trained]).detach()
        return call(case, batch | changed, counts).loss

    assert torch.autograd.gradcheck(value, (leaf,))
    assert torch.autograd.grad(value(leaf), leaf)[0].any()


@every_loss
def test_values_outside_the_mask_change_nothing(case: Case) -> None:
    """1e30 outside the mask would show in any sum it reached, and exp of it would be infinite."""
    batch = make_batch(case, 2)
    if "mask_N" not in batch:
        assert case.name == "reward"  # the only loss without tokens
        return
    counts = global_counts(case, batch)
    expected, gradient = call_with_gradient(case, batch, counts)
    outside = ~batch["mask_N"]
    assert outside.any()
    for garbage in (1e30, -1e30):
        changed = {
            key: torch.where(outside, garbage, value) if key.endswith("_N") and value.is_floating_point() else value
            for key, value in batch.items()
        }
        output, changed_gradient = call_with_gradient(case, changed, counts)
        assert torch.equal(output.loss, expected.loss)
        assert all(torch.equal(output.metrics[key], value) for key, value in expected.metrics.items())
        assert torch.equal(changed_gradient, gradient)
        assert torch.equal(changed_gradient[outside], torch.zeros(int(outside.sum()), dtype=torch.float64))


@every_loss
def test_only_the_first_argument_gets_a_gradient_and_nothing_is_modified(case: Case) -> None:
    batch = make_batch(case, 3)
    leaves = {k: v.clone().requires_grad_() if v.dtype == torch.float64 else v.clone() for k, v in batch.items()}
    output = call(case, leaves, global_counts(case, batch))
    output.loss.backward()
    with_gradient = {key for key, value in leaves.items() if value.is_leaf and value.grad is not None}
    assert with_gradient == {case.trained}
    assert all(not value.requires_grad and value.dim() == 0 for value in output.metrics.values())
    assert all(torch.equal(leaves[key].detach(), value) for key, value in batch.items())


@every_loss
@pytest.mark.parametrize("scale", [30.0, -30.0, 1e4, -1e4])
def test_extreme_differences_give_finite_values_and_gradients(case: Case, scale: float) -> None:
    """A trained column 30 (or 10,000) away from every other: float32 exp would overflow from 89 on."""
    batch = {k: v.float() if v.dtype == torch.float64 else v for k, v in make_batch(case, 4).items()}
    batch[case.trained] = batch[case.trained] * scale
    output, gradient = call_with_gradient(case, batch, global_counts(case, batch))
    assert torch.isfinite(torch.stack([output.loss, *output.metrics.values()])).all()
    assert torch.isfinite(gradient).all()


@every_loss
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_the_gradient_does_not_change_its_sign_at_the_cap_of_a_ratio(case: Case, side: float) -> None:
    """At log-ratios of +-31, beyond the cap of 30, every token is pushed the way it is at +-29, or not at all."""
    batch = make_batch(case, 13, lengths=torch.ones(SEQUENCES, dtype=torch.int64))
    others = [key for key in batch if key in ("old_logprobs_N", "reference_logprobs_N")]
    if not others:
        return
    low_N = torch.full_like(batch[case.trained], -40.0)
    changed = batch | dict.fromkeys(others, low_N)
    below_N, beyond_N = (
        call_with_gradient(case, changed | {case.trained: low_N + side * distance}, global_counts(case, batch))[1]
        for distance in (29.0, 31.0)
    )
    assert (below_N * beyond_N >= 0).all()


@every_loss
def test_empty_micro_batch_is_zero_and_trains_nothing(case: Case) -> None:
    """No token at all, and tokens with an empty mask: 0, not 0/0, even if the global count is 0."""
    empty, _ = take(make_batch(case, 5), [])
    output, gradient = call_with_gradient(case, empty, dict.fromkeys(case.counts, 7))
    assert output.loss == 0.0 and gradient.numel() == 0
    masked = make_batch(case, 5)
    if "mask_N" in masked:
        masked["mask_N"] = torch.zeros_like(masked["mask_N"])
    else:
        masked["labels_B"] = torch.zeros_like(masked["labels_B"])
    output, gradient = call_with_gradient(case, masked, global_counts(case, masked))
    assert not gradient.any()
    if case.name not in EMPTY_COUNTS:
        assert output.loss == 0.0
        assert all(value == 0.0 for value in output.metrics.values())


@every_loss
def test_one_token_is_a_batch(case: Case) -> None:
    """The smallest piece alone: one token, a pair of them, a group of one; twice the same over twice the count is it.

    A group of one makes no pair, so it has loss 0 and trains nothing.
    """
    batch = make_batch(case, 11, lengths=torch.ones(2 if case.unit == "pair" else 1, dtype=torch.int64))
    if "mask_N" in batch:
        batch["mask_N"][:] = True
    if "group_B" in batch:
        batch["group_B"][:] = 5
    once, gradient = call_with_gradient(case, batch, global_counts(case, batch))
    sequences = list(range(len(batch["offsets"]) - 1))
    twice, _ = take(batch, sequences + sequences)
    if "group_B" in batch:
        twice["group_B"] = torch.tensor([5, 6])
        assert once.loss == 0.0 and not gradient.any()
    output, gradient_of_twice = call_with_gradient(case, twice, global_counts(case, twice))
    assert_close(output, once)
    assert torch.isfinite(gradient).all()
    assert_close(gradient_of_twice, torch.cat([gradient, gradient]) / 2)


@pytest.mark.parametrize("case", [case for case in CASES if case.unit == "group"], ids=str)
def test_all_tied_groups_are_zero_and_train_nothing(case: Case) -> None:
    batch = make_batch(case, 12)
    tied = torch.full_like(batch["labels_B" if "labels_B" in batch else "rewards_B"], 0.1)
    batch |= {key: tied for key in ("labels_B", "rewards_B") if key in batch}
    assert global_counts(case, batch) == {"num_pairs": 0}
    output, gradient = call_with_gradient(case, batch, {"num_pairs": 0})
    assert output.loss == 0.0 and not gradient.any()
    assert all(value == 0.0 for value in output.metrics.values())


@every_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(case: Case, bad: float) -> None:
    batch = make_batch(case, 6)
    counts = global_counts(case, batch)
    for key, value in batch.items():
        if value.is_floating_point():
            spoiled = value.clone()
            spoiled[1] = bad
            with pytest.raises(InputError, match=rf"^{key} holds -?{abs(bad)} at position 1 \(1 of"):
                call(case, batch | {key: spoiled}, counts)


@every_loss
def test_a_wrong_shape_is_refused_by_name(case: Case) -> None:
    batch = make_batch(case, 7)
    counts = global_counts(case, batch)
    for key in [key for key in batch if key in case.parameters and key not in ("offsets", "mask_N", case.trained)]:
        for wrong in (batch[key][:-1], batch[key][None, :]):
            with pytest.raises(InputError, match=f"^{key} has shape"):
                call(case, batch | {key: wrong}, counts)
    with pytest.raises(InputError, match="has shape"):
        call(case, batch | {case.trained: batch[case.trained][None, :]}, counts)


@every_loss
def test_a_count_below_this_micro_batch_is_refused(case: Case) -> None:
    batch = make_batch(case, 8)
    counts = global_counts(case, batch)
    for count, local in counts.items():
        with pytest.raises(InputError, match=rf"^{count} is {local - 1}, but this micro-batch alone has"):
            call(case, batch, counts | {count: local - 1})


@every_loss
def test_every_number_is_checked(case: Case) -> None:
    """A NaN in any of the loss's numbers is refused by its name, never computed with."""
    batch = make_batch(case, 10)
    for key, value in case.numbers.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            numbers = case.numbers | {key: float("nan")}
            with pytest.raises(InputError, match=f"^{key} is nan"):
                call(Case(case.name, numbers), batch, global_counts(case, batch))


# Those without tokens and their one count. Scores, labels and pairs; tokens, rewards, pairs, and the offsets besides.
READS = {"reward": 3, "online_dpo": 4}


@every_loss
def test_a_loss_waits_for_the_device_once_and_once_more_for_offsets(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted are the ways of torch to make a Python number of a tensor, and `nonzero`, whose result has its length."""
    batch = make_batch(case, 14)
    counts = global_counts(case, batch)
    reads = []
    ways = [(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero")]
    for owner, name in [*ways, (torch, "nonzero")]:
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *x, _way=original, **y: reads.append(_way) or _way(*x, **y))
    call(case, batch, counts)
    monkeypatch.undo()
    needs_offsets = case.unit != "token" and "mask_N" in batch
    assert len(reads) == READS.get(case.name, 2 if needs_offsets else 1)


@every_loss
def test_all_of_a_loss_is_on_its_device(case: Case) -> None:
    """On a pretended one, so without a GPU; offsets may be on CPU, every other column on both is refused."""
    batch = make_batch(case, 15)
    counts = global_counts(case, batch)
    expected, gradient = call_with_gradient(case, batch, counts)
    with PretendCuda():
        moved = {key: on_cuda(value) for key, value in batch.items()}
        for columns in (moved, moved | {"offsets": batch["offsets"]}):
            output, found = call_with_gradient(case, columns, counts)
            assert all(isinstance(value, OnCuda) for value in output.metrics.values())
            assert torch.equal(output.loss.held, expected.loss)
            assert torch.equal(found.held, gradient)
        for key in batch.keys() & case.parameters.keys() - {"offsets"}:
            with pytest.raises(RuntimeError, match="on cpu, and others on cuda"):
                call(case, moved | {key: batch[key]}, counts)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_loss
def test_cuda_equals_cpu(case: Case) -> None:
    """The same float64 batch on both devices; the second run on CUDA must repeat the first bit for bit."""
    batch = make_batch(case, 9)
    on_cuda = {key: value.cuda() for key, value in batch.items()}
    counts = global_counts(case, batch)
    expected, gradient = call_with_gradient(case, batch, counts)
    output, cuda_gradient = call_with_gradient(case, on_cuda, counts)
    again, _ = call_with_gradient(case, on_cuda, counts)
    assert torch.equal(output.loss, again.loss)
    assert_close(output.loss.cpu(), expected.loss)
    assert_close({key: value.cpu() for key, value in output.metrics.items()}, expected.metrics)
    assert_close(cuda_gradient.cpu(), gradient)


def test_bfloat16_columns_are_computed_in_float32() -> None:
    """log-probs -1 and -0.00390625 are exact in bfloat16; their sum 1.00390625 is not (it would round to 1.0)."""
    logprobs = torch.tensor([-1.0, -0.00390625], dtype=torch.bfloat16)
    output = losses.sft_loss(logprobs, torch.ones(2, dtype=torch.bool), num_tokens=2)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == 1.00390625 / 2


def bad_loss(fault: str, logprobs_N: Tensor, mask_N: Tensor, num_tokens: int) -> LossOutput:
    """The SFT loss with one of the usual mistakes."""
    if fault == "mean of the micro-batch":
        num_tokens = max(int(mask_N.sum()), 1)
    if fault == "0/0":
        num_tokens = int(mask_N.sum())
    if fault == "gradient of the wrong size":
        logprobs_N = 2.0 * logprobs_N - logprobs_N.detach()
    if fault == "made on CPU":
        logprobs_N = logprobs_N + torch.zeros(len(logprobs_N))
    if fault in ("NaN computed with", "reads outside the mask", "0/0"):
        inside_N = logprobs_N if fault == "reads outside the mask" else torch.where(mask_N, logprobs_N, 0.0)
        loss = -inside_N.sum() / num_tokens
        return LossOutput(loss, {"nll": loss.detach()})
    return losses.sft_loss(logprobs_N, mask_N, num_tokens=num_tokens)


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("mean of the micro-batch", "any split into micro batches gives the same value and gradient"),
        ("gradient of the wrong size", "gradient equals finite differences"),
        ("reads outside the mask", "values outside the mask change nothing"),
        ("NaN computed with", "a value that is not finite is refused by name"),
        ("0/0", "empty micro batch is zero and trains nothing"),
        ("made on CPU", "all of a loss is on its device"),
    ],
)
def test_a_loss_with_a_fault_fails_its_check(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks above can fail: each finds the fault it is there for, in a loss that somebody registers."""

    def faulty(logprobs_N: Tensor, mask_N: Tensor, *, num_tokens: int) -> LossOutput:
        return bad_loss(fault, logprobs_N, mask_N, num_tokens)

    entry = Loss(function=faulty, counts=("num_tokens",), unit="token")
    monkeypatch.setitem(registry._LOSSES, "faulty", entry)
    case = Case("faulty", {})
    with pytest.raises(AssertionError):
        test_every_loss_has_numbers()
    function = globals()[f"test_{check.replace(' ', '_')}"]
    if hasattr(function, "hypothesis"):
        quick = settings(max_examples=20, deadline=None, database=None, report_multiple_bugs=False)
        function = quick(given(data=st.data())(function.hypothesis.inner_test))
    arguments = {"bad": float("nan")} if "bad" in inspect.signature(function).parameters else {}
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        function(case=case, **arguments)


def install(folder: Path, point: str, source: str, *, name: str = "third-party-loss") -> None:
    """A distribution with one entry point, as pip would leave it."""
    module = name.replace("-", "_")
    folder.joinpath(f"{module}.py").write_text(source, encoding="utf-8")
    information = folder / f"{module}-1.0.dist-info"
    information.mkdir()
    information.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    information.joinpath("entry_points.txt").write_text(f"[align.losses]\n{point}\n", encoding="utf-8")


def test_an_installed_package_adds_a_loss_that_cannot_skip_these_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "import align_algos\nMINE = align_algos.Loss(function=len, counts=('num_tokens',), unit='token')\n"
    install(tmp_path, "mine = third_party_loss:MINE\nwrong = third_party_loss:align_algos", source)
    monkeypatch.syspath_prepend(tmp_path)
    assert {"mine", "sft"} <= set(loss_names())
    assert get_loss("mine").function is len
    with pytest.raises(AssertionError):
        test_every_loss_has_numbers()
    with pytest.raises(
        InputError, match=r"'wrong' of group 'align.losses' is module third_party_loss:align_algos; exp"
    ):
        get_loss("wrong")
    with pytest.raises(InputError, match="already named 'mine'"):
        register_loss("mine", get_loss("sft"))


def test_a_name_that_several_packages_offer_is_refused_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two third parties with a `theirs`, one of which also offers our `sft`: which is meant nobody can say."""
    source = "import align_algos\nMINE = align_algos.Loss(function=len, counts=('num_tokens',), unit='token')\n"
    install(tmp_path, "theirs = first_loss:MINE\nsft = first_loss:MINE", source, name="first-loss")
    install(tmp_path, "theirs = second_loss:MINE\nfine = second_loss:MINE", source, name="second-loss")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'theirs' is offered by each of \['first-loss', 'second-loss'\]; uninstall"):
        get_loss("theirs")
    with pytest.raises(InputError, match=r"'sft' is offered by each of \['align-algos', 'first-loss'\]; uninstall"):
        get_loss("sft")
    assert get_loss("fine").function is len
    assert get_loss("dpo").function is losses.dpo_loss


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(InputError, match=r"no loss is named 'grop'; choose one of \[.*'cispo', 'dapo'"):
        get_loss("grop")


def test_register_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(InputError, match="already named 'sft'"):
        register_loss("sft", Loss(function=losses.sft_loss, counts=("num_tokens",), unit="token"))
