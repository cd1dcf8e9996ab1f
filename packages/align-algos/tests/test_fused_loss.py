"""Losses piece by piece from hidden states equal the same losses on all log-probs at once."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from align_algos import (
    FusedOutput,
    InputError,
    LossOutput,
    dpo_loss,
    entropy_loss,
    fused_cross_entropy,
    fused_logprobs,
    fused_loss,
    grpo_loss,
    sft_loss,
    sum_outputs,
)

OFFSETS = torch.tensor([0, 3, 3, 5, 9, 10, 12])  # six sequences, one without tokens; three pairs
TOKENS, HIDDEN, VOCABULARY = 12, 5, 20
NUMBERS = {"num_tokens": 20, "clip_low": 0.2, "clip_high": 0.2}  # 20: this is a micro-batch of a larger batch


class Model:
    def __init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        shapes = ((TOKENS, HIDDEN), (VOCABULARY, HIDDEN))
        self.hidden, self.weight = (
            torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes
        )
        self.targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
        self.mask = torch.rand(TOKENS, generator=random) < 0.7
        self.advantages = torch.randn(TOKENS, generator=random, dtype=torch.float64)
        noise = 0.3 * torch.randn(2, TOKENS, generator=random, dtype=torch.float64)
        self.old, self.reference = fused_logprobs(self.hidden, self.weight, self.targets).logprobs_N.detach() + noise

    def grpo(self, output: FusedOutput, rows: slice) -> LossOutput:
        columns = (self.old[rows], self.advantages[rows], self.mask[rows])
        extra = {"reference_logprobs_N": self.reference[rows], "kl_coef": 0.1}
        loss, metrics = grpo_loss(output.logprobs_N, *columns, **NUMBERS, **extra)
        assert output.entropy_N is not None
        bonus = entropy_loss(output.entropy_N, self.mask[rows], num_tokens=20, coef=0.01)
        return LossOutput(loss + bonus.loss, {**metrics, "whole_entropy": bonus.metrics["entropy"]})

    def dpo(self, output: FusedOutput, rows: slice) -> LossOutput:
        inside = OFFSETS[(rows.start <= OFFSETS) & (rows.stop >= OFFSETS)] - rows.start
        return dpo_loss(output.logprobs_N, self.reference[rows], self.mask[rows], inside, beta=0.3, num_pairs=3)

    def gradients(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        return torch.autograd.grad(loss, (self.hidden, self.weight))


def rows_of(count: int) -> int:
    return count * VOCABULARY * 8


@pytest.mark.parametrize("rows", [1, 4, 5, 100])
def test_a_token_loss_with_entropy_equals_that_of_all_tokens(rows: int) -> None:
    model = Model()
    output = fused_loss(
        model.hidden, model.weight, model.targets, model.grpo, entropy=True, block_bytes=rows_of(rows), temperature=0.9
    )
    whole = fused_logprobs(model.hidden, model.weight, model.targets, entropy=True, temperature=0.9)
    expected = model.grpo(whole, slice(0, TOKENS))
    assert_close(output.loss, expected.loss)
    assert_close(output.metrics, expected.metrics)
    assert_close(output.logprobs_N, whole.logprobs_N.detach())
    for found, truth in zip(model.gradients(2.0 * output.loss), model.gradients(2.0 * expected.loss)):
        assert_close(found, truth)


def test_a_loss_over_pairs_is_cut_only_between_pairs() -> None:
    """Blocks of 4 rows, pairs of 3, 6 and 3 rows: three calls, whole pairs each; the long one exceeds the block."""
    model, seen = Model(), []

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        seen.append((rows.start, rows.stop))
        offsets = {0: [0, 3, 3], 3: [0, 2, 6], 9: [0, 1, 3]}[rows.start]
        columns = (model.reference[rows], model.mask[rows], torch.tensor(offsets))
        return dpo_loss(output.logprobs_N, *columns, beta=0.3, num_pairs=3)

    output = fused_loss(model.hidden, model.weight, model.targets, piece, cuts=OFFSETS[::2], block_bytes=rows_of(4))
    assert seen == [(0, 3), (3, 9), (9, 12)]
    whole = fused_logprobs(model.hidden, model.weight, model.targets)
    expected = dpo_loss(whole.logprobs_N, model.reference, model.mask, OFFSETS, beta=0.3, num_pairs=3)
    assert_close(output.loss, expected.loss)
    assert_close(output.metrics, expected.metrics)
    for found, truth in zip(model.gradients(output.loss), model.gradients(expected.loss)):
        assert_close(found, truth)


def test_short_pieces_share_a_block() -> None:
    """Blocks of 8 rows over cuts at 0, 3, 3, 5, 9, 10, 12: rows 0 to 5, then 5 to 12."""
    model, seen = Model(), []

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        seen.append((rows.start, rows.stop))
        return sft_loss(output.logprobs_N, model.mask[rows], num_tokens=20)

    fused_loss(model.hidden, model.weight, model.targets, piece, cuts=OFFSETS, block_bytes=rows_of(8))
    assert seen == [(0, 5), (5, 12)]


@pytest.mark.parametrize("sum_dtype", [torch.float32, torch.bfloat16])
def test_sums_in_sixteen_bits_round_after_each_piece_and_no_more(sum_dtype: torch.dtype) -> None:
    """Of 10 pieces; 2^-8 is the spacing of bfloat16. float32 sums of float32 inputs are not made narrower."""
    model = Model()
    low = [x.detach().to(torch.bfloat16).requires_grad_() for x in (model.hidden, model.weight)]
    wide = [x.detach().double().requires_grad_() for x in low]

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        return sft_loss(output.logprobs_N, model.mask[rows], num_tokens=20)

    loss = fused_loss(*low, model.targets, piece, block_bytes=1, sum_dtype=sum_dtype).loss
    truth = fused_loss(*wide, model.targets, piece).loss
    for found, expected in zip(torch.autograd.grad(loss, low), torch.autograd.grad(truth, wide)):
        error = float((found.double() - expected).norm() / expected.norm())
        assert error < (2e-2 if sum_dtype == torch.bfloat16 else 1e-2)
    assert loss.dtype == torch.float32


def test_without_gradient_nothing_is_kept_and_the_value_is_the_same() -> None:
    model = Model()
    with torch.no_grad():
        output = fused_loss(model.hidden, model.weight, model.targets, model.grpo, entropy=True)
    assert not output.loss.requires_grad
    assert_close(
        output.loss, fused_loss(model.hidden, model.weight, model.targets, model.grpo, entropy=True).loss.detach()
    )


def test_a_loss_that_ignores_its_rows_gives_zero_gradient() -> None:
    """All masked: as of an empty mask anywhere else, 0 and no gradient; also without any token."""
    model = Model()
    nothing = torch.zeros_like(model.mask)

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        return sft_loss(output.logprobs_N, nothing[rows], num_tokens=20)

    output = fused_loss(model.hidden, model.weight, model.targets, piece)
    assert output.loss == 0.0 and not any(x.any() for x in model.gradients(output.loss))
    empty = fused_loss(model.hidden[:0], model.weight, model.targets[:0], piece)
    assert empty.loss == 0.0 and empty.metrics["nll"] == 0.0
    (gradient,) = torch.autograd.grad(empty.loss, model.weight)
    assert not gradient.any()


def test_float16_is_refused_where_a_gradient_is_wanted() -> None:
    """Loss scaling of 2^15 over weights of 1/32768: the gradients of 1e-5 and less must not be rounded at scale 1.

    `fused_logprobs`, to which the error points, gets the scale with the gradient.
    """
    random = torch.Generator().manual_seed(0)
    hidden, weight = ((torch.randn(n, 16, generator=random) / 4).half().requires_grad_() for n in (64, 1000))
    targets, weights = torch.randint(0, 1000, (64,), generator=random), torch.full((64,), 2.0**-15)
    with pytest.raises(InputError, match=r"torch.float16, in which gradients vanish .* use fused_logprobs"):
        fused_cross_entropy(hidden, weight, targets, weights)
    with torch.no_grad():
        _, logprobs = fused_cross_entropy(hidden, weight, targets, weights)
    scored = fused_logprobs(hidden, weight, targets).logprobs_N
    assert_close(scored.detach(), logprobs)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = fused_logprobs(wide[0], wide[1], targets).logprobs_N
    found = torch.autograd.grad(2.0**15 * (scored @ weights), (hidden, weight))
    for gradient, expected in zip(found, torch.autograd.grad(2.0**15 * (truth @ weights.double()), wide)):
        assert (gradient.double() - expected).norm() < 2e-3 * expected.norm()


def test_metrics_have_no_gradient() -> None:
    """A callable that forgets to detach them must not keep the graph of every piece alive."""
    model = Model()

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        loss, _ = sft_loss(output.logprobs_N, model.mask[rows], num_tokens=20)
        return LossOutput(loss, {"nll": loss})

    output = fused_loss(model.hidden, model.weight, model.targets, piece, block_bytes=rows_of(4))
    assert output.loss.requires_grad and not output.metrics["nll"].requires_grad
    assert_close(output.metrics["nll"], output.loss.detach())


@pytest.mark.parametrize("through", [lambda x: x, lambda x: 2.0 * x.exp()], ids=["leaf", "graph"])
def test_a_loss_with_a_gradient_to_something_else_is_refused(through: Any) -> None:
    """It would be lost: the graph of a piece is gone when backward is called."""
    model, scale = Model(), torch.ones(1, 1, dtype=torch.float64, requires_grad=True)

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        return LossOutput((through(scale) * output.logprobs_N).sum(), {})

    with pytest.raises(InputError, match=r"another tensor that requires grad, of shape \[1, 1\]"):
        fused_loss(model.hidden, model.weight, model.targets, piece)


def test_cuts_that_do_not_fit_are_refused() -> None:
    model = Model()
    with pytest.raises(InputError, match="offsets go from 0 to 10; expected 0 to 12"):
        fused_loss(model.hidden, model.weight, model.targets, model.grpo, cuts=torch.tensor([0, 10]), entropy=True)


def test_sum_of_outputs_adds_key_by_key() -> None:
    parts = [LossOutput(torch.tensor(x), {"a": torch.tensor(2 * x)}) for x in (1.0, 2.0)]
    assert_close(sum_outputs(parts), LossOutput(torch.tensor(3.0), {"a": torch.tensor(6.0)}))


class Largest(TorchDispatchMode):
    """The most elements of any result that is larger than the output matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.elements = weight, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor) and output.numel() > self.weight.numel():
            self.elements = max(self.elements, output.numel())
        return output


def test_the_logits_never_exist() -> None:
    """512 tokens, hidden 2, vocabulary 1,024, bf16: blocks of 64 and 128 Ki elements where logits would have 512 Ki."""
    random = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 2, generator=random).bfloat16().requires_grad_() for n in (512, 1024))
    targets, mask = torch.zeros(512, dtype=torch.int64), torch.ones(512, dtype=torch.bool)

    def piece(output: FusedOutput, rows: slice) -> LossOutput:
        return sft_loss(output.logprobs_N, mask[rows], num_tokens=512)

    with Largest(weight) as by_rows:
        fused_loss(hidden, weight, targets, piece, block_bytes=128 << 10).loss.backward()
    with Largest(weight) as by_columns:
        output = fused_logprobs(hidden, weight, targets, entropy=True, block_bytes=256 << 10)
        (output.logprobs_N.sum() + output.entropy_N.sum()).backward()
    assert by_rows.elements == 64 << 10
    assert by_columns.elements == 128 << 10  # a block has 256 columns at least
