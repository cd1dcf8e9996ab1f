"""What every registered loss must obey, checked over the whole registry, so that a new loss cannot skip it.

A batch is made from the loss's own signature: names ending in _N get a value per token, in _B per sequence. A new loss
needs only its keyword numbers in NUMBERS below; without them `test_every_loss_has_numbers` fails.
"""

import importlib
import inspect
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, Loss, LossOutput, count_pairs, get_loss, loss_names, losses, register_loss

NUMBERS: dict[str, dict[str, float]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1},
    "grpo": {"clip_low": 0.2, "clip_high": 0.3, "kl_coef": 0.1},
    "ppo_policy": {"clip_low": 0.2, "clip_high": 0.3},
    "reward": {},
    "sft": {},
    "value": {"clip": 0.5},
}
SEQUENCES = 8

every_loss = pytest.mark.parametrize("name", loss_names())
Batch = dict[str, Tensor]


def make_batch(name: str, seed: int) -> Batch:
    """Float64 tensors for the parameters of the loss; 8 sequences of 0 to 5 tokens, one token each for unit token."""
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (SEQUENCES,), generator=random)
    if get_loss(name).unit == "token":
        lengths = torch.ones(3 * SEQUENCES, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    batch: Batch = {"offsets": offsets}
    for parameter in inspect.signature(get_loss(name).function).parameters:
        if parameter == "mask_N":
            batch[parameter] = torch.rand(int(offsets[-1]), generator=random) < 0.7
        elif parameter == "group_B":
            batch[parameter] = torch.randint(0, 3, (len(lengths),), generator=random)
        elif parameter == "labels_B":
            batch[parameter] = torch.randint(0, 4, (len(lengths),), generator=random) / 2.0
        elif parameter.endswith(("_N", "_B")):
            length = int(offsets[-1]) if parameter.endswith("_N") else len(lengths)
            batch[parameter] = torch.randn(length, generator=random, dtype=torch.float64)
    return batch


def trained(name: str) -> str:
    """The first parameter of a loss is the one it trains."""
    return next(iter(inspect.signature(get_loss(name).function).parameters))


def global_count(batch: Batch, name: str) -> int:
    if get_loss(name).count == "num_tokens":
        return int(batch["mask_N"].sum())
    if "group_B" in batch:
        return count_pairs(batch["labels_B"], batch["group_B"])
    return (len(batch["offsets"]) - 1) // 2


def call(name: str, batch: Batch, count: int) -> LossOutput:
    parameters = inspect.signature(get_loss(name).function).parameters
    tensors = {key: value for key, value in batch.items() if key in parameters}
    return get_loss(name).function(**tensors, **NUMBERS[name], **{get_loss(name).count: count})


def call_with_gradient(name: str, batch: Batch, count: int) -> tuple[LossOutput, Tensor]:
    leaf = batch[trained(name)].clone().requires_grad_()
    output = call(name, batch | {trained(name): leaf}, count)
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


def pieces(batch: Batch, name: str) -> list[list[int]]:
    """Sequences that must stay together, by the loss's unit."""
    sequences = range(len(batch["offsets"]) - 1)
    if get_loss(name).unit == "pair":
        return [[b, b + 1] for b in sequences[::2]]
    if get_loss(name).unit == "group":
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
    assert found == {get_loss(name).function for name in loss_names()}


@every_loss
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_split_into_micro_batches_gives_the_same_value_and_gradient(name: str, data: st.DataObject) -> None:
    """Pieces are shuffled and dealt to 3 micro-batches (some may stay empty); outputs add up, gradients line up."""
    batch = make_batch(name, data.draw(st.integers(0, 2**31)))
    whole, gradient = call_with_gradient(name, batch, global_count(batch, name))
    order = data.draw(st.permutations(pieces(batch, name)))
    dealt = data.draw(st.lists(st.integers(0, 2), min_size=len(order), max_size=len(order)))
    rejoined = torch.full_like(gradient, torch.nan)
    parts = []
    for number in range(3):
        sequences = [b for piece, micro in zip(order, dealt) if micro == number for b in piece]
        micro_batch, tokens = take(batch, sequences)
        output, part_gradient = call_with_gradient(name, micro_batch, global_count(batch, name))
        rejoined[tokens if trained(name).endswith("_N") else torch.tensor(sequences, dtype=torch.int64)] = part_gradient
        parts.append(output)
    assert_close(sum(part.loss for part in parts), whole.loss)
    for key, value in whole.metrics.items():
        assert_close(sum(part.metrics[key] for part in parts), value)
    assert_close(rejoined, gradient)


@every_loss
def test_gradient_equals_finite_differences(name: str) -> None:
    batch = make_batch(name, 1)
    count = global_count(batch, name)
    leaf = batch[trained(name)].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: call(name, batch | {trained(name): x}, count).loss, (leaf,))


@every_loss
def test_values_outside_the_mask_change_nothing(name: str) -> None:
    """1e30 outside the mask would show in any sum it reached, and exp of it would be infinite."""
    batch = make_batch(name, 2)
    if "mask_N" not in batch:
        assert get_loss(name).unit == "group"  # the only losses without tokens
        return
    expected, gradient = call_with_gradient(name, batch, global_count(batch, name))
    outside = ~batch["mask_N"]
    assert outside.any()
    for garbage in (1e30, -1e30):
        changed = {
            key: torch.where(outside, garbage, value) if key.endswith("_N") and value.is_floating_point() else value
            for key, value in batch.items()
        }
        output, changed_gradient = call_with_gradient(name, changed, global_count(batch, name))
        assert torch.equal(output.loss, expected.loss)
        assert all(torch.equal(output.metrics[key], value) for key, value in expected.metrics.items())
        assert torch.equal(changed_gradient, gradient)
        assert torch.equal(changed_gradient[outside], torch.zeros(int(outside.sum()), dtype=torch.float64))


@every_loss
def test_only_the_first_argument_gets_a_gradient_and_nothing_is_modified(name: str) -> None:
    batch = make_batch(name, 3)
    leaves = {k: v.clone().requires_grad_() if v.dtype == torch.float64 else v.clone() for k, v in batch.items()}
    output = call(name, leaves, global_count(batch, name))
    output.loss.backward()
    with_gradient = {key for key, value in leaves.items() if value.is_leaf and value.grad is not None}
    assert with_gradient == {trained(name)}
    assert all(not value.requires_grad and value.dim() == 0 for value in output.metrics.values())
    assert all(torch.equal(leaves[key].detach(), value) for key, value in batch.items())


@every_loss
@pytest.mark.parametrize("scale", [30.0, -30.0, 1e4, -1e4])
def test_extreme_differences_give_finite_values_and_gradients(name: str, scale: float) -> None:
    """A trained column 30 (or 10,000) away from every other: float32 exp would overflow from 89 on."""
    batch = {k: v.float() if v.dtype == torch.float64 else v for k, v in make_batch(name, 4).items()}
    batch[trained(name)] = batch[trained(name)] * scale
    output, gradient = call_with_gradient(name, batch, global_count(batch, name))
    assert torch.isfinite(torch.stack([output.loss, *output.metrics.values()])).all()
    assert torch.isfinite(gradient).all()


@every_loss
def test_empty_micro_batch_is_zero_and_trains_nothing(name: str) -> None:
    """No token at all, and tokens with an empty mask: 0, not 0/0, even if the global count is 0."""
    empty, _ = take(make_batch(name, 5), [])
    output, gradient = call_with_gradient(name, empty, 7)
    assert output.loss == 0.0 and gradient.numel() == 0
    masked = make_batch(name, 5)
    if "mask_N" in masked:
        masked["mask_N"] = torch.zeros_like(masked["mask_N"])
    else:
        masked["labels_B"] = torch.zeros_like(masked["labels_B"])
    if get_loss(name).unit != "pair":  # a pair counts even where both responses are empty
        output, gradient = call_with_gradient(name, masked, 0)
        assert output.loss == 0.0 and not gradient.any()
        assert all(value == 0.0 for value in output.metrics.values())


@every_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_is_refused_by_name(name: str, bad: float) -> None:
    batch = make_batch(name, 6)
    for key, value in batch.items():
        if value.is_floating_point():
            spoiled = value.clone()
            spoiled[1] = bad
            with pytest.raises(InputError, match=rf"^{key} holds -?{abs(bad)} at position 1 \(1 of"):
                call(name, batch | {key: spoiled}, global_count(batch, name))


@every_loss
def test_a_wrong_shape_is_refused_by_name(name: str) -> None:
    batch = make_batch(name, 7)
    parameters = inspect.signature(get_loss(name).function).parameters
    for key in [key for key in batch if key in parameters and key not in ("offsets", "mask_N", trained(name))]:
        for wrong in (batch[key][:-1], batch[key][None, :]):
            with pytest.raises(InputError, match=f"^{key} has shape"):
                call(name, batch | {key: wrong}, global_count(batch, name))
    with pytest.raises(InputError, match="has shape"):
        call(name, batch | {trained(name): batch[trained(name)][None, :]}, global_count(batch, name))


@every_loss
def test_a_count_below_this_micro_batch_is_refused(name: str) -> None:
    batch = make_batch(name, 8)
    local = global_count(batch, name)
    with pytest.raises(InputError, match=rf"^{get_loss(name).count} is {local - 1}, but this micro-batch alone has"):
        call(name, batch, local - 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_loss
def test_cuda_equals_cpu(name: str) -> None:
    """The same float64 batch on both devices; the second run on CUDA must repeat the first bit for bit."""
    batch = make_batch(name, 9)
    on_cuda = {key: value.cuda() for key, value in batch.items()}
    expected, gradient = call_with_gradient(name, batch, global_count(batch, name))
    output, cuda_gradient = call_with_gradient(name, on_cuda, global_count(batch, name))
    again, _ = call_with_gradient(name, on_cuda, global_count(batch, name))
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


def test_unknown_name_lists_the_choices() -> None:
    with pytest.raises(InputError, match=r"no loss is named 'grop'; choose one of \['dpo', 'grpo'"):
        get_loss("grop")


def test_register_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(InputError, match="already named 'sft'"):
        register_loss("sft", Loss(function=losses.sft_loss, count="num_tokens", unit="token"))
