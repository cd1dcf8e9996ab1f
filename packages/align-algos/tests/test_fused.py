"""Fused log-probabilities against the unfused way in float64, on every path: blocks, kept logits, entropy, Triton."""

import importlib.util
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, NonFiniteError, fused_cross_entropy, fused_logprobs

# Relative to the norm of the float64 result, from the same rounded inputs.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
TOKENS, HIDDEN, ROWS, VOCABULARY = 37, 16, 1000, 900

every_dtype = pytest.mark.parametrize("dtype", BOUNDS, ids=str)


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    """Weight of each log-probability in the loss, and of each entropy: [2, N]."""


def make_case(dtype: torch.dtype, device: str = "cpu") -> Case:
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=random), torch.randn(ROWS, HIDDEN, generator=random)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
    upstream = torch.randn(2, TOKENS, generator=random, dtype=torch.float64)
    hidden, weight = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
    return Case(hidden, weight, targets.to(device), upstream.to(device))


def expected(case: Case, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies in float64, with gradient."""
    logits = case.hidden.double() @ case.weight[:VOCABULARY].double().T / temperature
    logprobs = logits.log_softmax(1)
    return logprobs.gather(1, case.targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


def gradients(loss: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    return torch.autograd.grad(loss, (case.hidden, case.weight))


def assert_near(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    size = truth.detach().double().norm()
    error = (found.detach().double() - truth.detach().double()).norm()
    assert error <= BOUNDS[dtype] * size, f"error {error:.1e} beside {size:.1e}"


def check_logprobs(case: Case, *, temperature: float, block: int, keep: int, entropy: bool) -> None:
    """Values and both gradients, relative to float64."""
    dtype = case.hidden.dtype
    columns = block * TOKENS * case.hidden.element_size()
    output = fused_logprobs(
        case.hidden,
        case.weight,
        case.targets,
        vocab_size=VOCABULARY,
        temperature=temperature,
        entropy=entropy,
        block_bytes=columns,
        keep_bytes=keep * columns,
    )
    logprobs, entropies = expected(case, temperature)
    assert_near(output.logprobs_N, logprobs, dtype)
    loss, truth = output.logprobs_N.double() @ case.upstream[0], logprobs @ case.upstream[0]
    assert (output.entropy_N is not None) == entropy
    if output.entropy_N is not None:
        assert_near(output.entropy_N, entropies, dtype)
        loss, truth = loss + output.entropy_N.double() @ case.upstream[1], truth + entropies @ case.upstream[1]
    for found, wanted in zip(gradients(loss, case), gradients(truth, case)):
        assert found.dtype == dtype
        assert_near(found, wanted, dtype)


def check_expanded_gradient(case: Case) -> None:
    """The upstream gradient of a sum is one number with stride 0; so is that of the entropies."""
    output = fused_logprobs(case.hidden, case.weight, case.targets, vocab_size=VOCABULARY, entropy=True)
    assert output.entropy_N is not None
    logprobs, entropies = expected(case, 1.0)
    truth = gradients(logprobs.sum() + entropies.sum(), case)
    for found, wanted in zip(gradients(output.logprobs_N.sum() + output.entropy_N.sum(), case), truth):
        assert_near(found, wanted, case.hidden.dtype)


def check_cross_entropy(case: Case, *, temperature: float, rows: int) -> None:
    """Loss, log-probs and both gradients, scaled by an upstream factor of 3."""
    dtype, weights = case.hidden.dtype, case.upstream[0]
    loss, logprobs = fused_cross_entropy(
        case.hidden,
        case.weight,
        case.targets,
        weights,
        vocab_size=VOCABULARY,
        temperature=temperature,
        block_bytes=rows * VOCABULARY * case.hidden.element_size(),
    )
    wanted, _ = expected(case, temperature)
    assert_near(logprobs, wanted, dtype)
    scale = (wanted * weights).abs().sum()  # not the loss itself: terms of both signs cancel
    assert abs(loss.double() + wanted @ weights) < BOUNDS[dtype] * scale
    assert not logprobs.requires_grad
    for found, truth in zip(gradients(3.0 * loss, case), gradients(-3.0 * (wanted @ weights), case)):
        assert found.dtype == dtype
        assert_near(found, truth, dtype)


def test_value_and_gradient_by_hand() -> None:
    """Hidden 1 and rows ln 1, ln 2, ln 5 of the output matrix: probabilities 1/8, 2/8, 5/8; a fourth row is padding.

    log p(1) = ln 0.25;  d log p(1) / d hidden = ln 2 - (1/8 x 0 + 2/8 ln 2 + 5/8 ln 5) = -0.486038;
    d log p(1) / d weight = one-hot - p = (-.125, .75, -.625, 0).
    """
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(2.0)], [math.log(5.0)], [50.0]], requires_grad=True)
    output = fused_logprobs(hidden, weight, torch.tensor([1]), vocab_size=3)
    assert_close(output.logprobs_N, torch.tensor([math.log(0.25)]))
    output.logprobs_N.sum().backward()
    assert_close(hidden.grad, torch.tensor([[-0.486038]]), rtol=1e-5, atol=1e-6)
    assert_close(weight.grad, torch.tensor([[-0.125], [0.75], [-0.625], [0.0]]))


@every_dtype
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("temperature", "block", "keep"), [(1.0, 256, 0), (0.7, 256, 2), (1.0, 512, 99), (1.3, 9999, 0)]
)
def test_logprobs_equal_the_unfused_way(
    dtype: torch.dtype, entropy: bool, temperature: float, block: int, keep: int
) -> None:
    check_logprobs(make_case(dtype), temperature=temperature, block=block, keep=keep, entropy=entropy)


@every_dtype
@pytest.mark.parametrize(("temperature", "rows"), [(1.0, 1), (0.7, 16), (1.0, 9999)])
def test_cross_entropy_equals_the_unfused_way(dtype: torch.dtype, temperature: float, rows: int) -> None:
    check_cross_entropy(make_case(dtype), temperature=temperature, rows=rows)


@every_dtype
def test_gradient_of_a_plain_sum(dtype: torch.dtype) -> None:
    check_expanded_gradient(make_case(dtype))


def test_gradients_by_finite_differences() -> None:
    """Both outputs, both inputs, in float64, over several blocks."""
    random = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 3, generator=random, dtype=torch.float64).requires_grad_() for n in (4, 600))
    targets = torch.tensor([0, 599, 256, 3])

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        output = fused_logprobs(
            hidden, weight, targets, entropy=True, temperature=0.8, block_bytes=1, keep_bytes=1 << 14
        )
        assert output.entropy_N is not None
        return output.logprobs_N, output.entropy_N

    assert torch.autograd.gradcheck(outputs, (hidden, weight), fast_mode=True)


def test_only_what_is_asked_for_is_computed() -> None:
    """A frozen output matrix gets no gradient; a frozen model needs none at all; both give the same values."""
    case = make_case(torch.float32)
    frozen = case.weight.detach()
    output = fused_logprobs(case.hidden, frozen, case.targets)
    (gradient,) = torch.autograd.grad(output.logprobs_N.sum(), case.hidden)
    assert gradient.any()
    with torch.no_grad():
        assert torch.equal(fused_logprobs(case.hidden, case.weight, case.targets).logprobs_N, output.logprobs_N)
    loss, _ = fused_cross_entropy(case.hidden.detach(), case.weight, case.targets, torch.ones(TOKENS))
    (gradient,) = torch.autograd.grad(loss, case.weight)
    assert gradient.any()


def test_an_entropy_that_is_not_used_changes_nothing() -> None:
    case = make_case(torch.float32)
    with_it, without = (
        fused_logprobs(case.hidden, case.weight, case.targets, entropy=entropy) for entropy in (True, False)
    )
    for found, truth in zip(gradients(with_it.logprobs_N.sum(), case), gradients(without.logprobs_N.sum(), case)):
        assert torch.equal(found, truth)


@pytest.mark.parametrize("keep", [0, 1 << 30])
def test_autocast_changes_nothing(keep: int) -> None:
    """float32 inputs under autocast to bfloat16: same values and gradients, whether backward runs under it or not."""
    case = make_case(torch.float32)

    def losses() -> tuple[Tensor, Tensor]:
        output = fused_logprobs(case.hidden, case.weight, case.targets, entropy=True, keep_bytes=keep)
        assert output.entropy_N is not None
        loss, _ = fused_cross_entropy(case.hidden, case.weight, case.targets, torch.ones(TOKENS))
        return output.logprobs_N.sum() + output.entropy_N.sum(), loss

    truth = [(loss, gradients(loss, case)) for loss in losses()]
    with torch.autocast("cpu", torch.bfloat16):
        inside = [(loss, gradients(loss, case)) for loss in losses()]
        started = losses()
    outside = [(loss, gradients(loss, case)) for loss in started]
    for (loss, expected_gradients), *others in zip(truth, inside, outside):
        for other, found in others:
            assert torch.equal(other, loss)
            assert all(torch.equal(x, y) for x, y in zip(found, expected_gradients))


def test_no_tokens() -> None:
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(8, 4, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss, _ = fused_cross_entropy(hidden, weight, none, torch.zeros(0))
    (fused_logprobs(hidden, weight, none).logprobs_N.sum() + loss).backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 4)
    assert weight.grad is not None and not weight.grad.any()


def test_huge_logits_stay_exact() -> None:
    """Logits 0 and 3e38 apart by far more than exp can tell: log p is 0 and minus the difference, gradients finite."""
    hidden = torch.tensor([[1e19], [1e19]], requires_grad=True)
    weight = torch.tensor([[3e18], [0.0]], requires_grad=True)
    output = fused_logprobs(hidden, weight, torch.tensor([0, 1]), entropy=True)
    assert output.entropy_N is not None
    assert_close(output.logprobs_N, torch.tensor([0.0, -3e37]))
    assert_close(output.entropy_N, torch.zeros(2))
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(output.logprobs_N[0], (hidden, weight)))


def check_not_finite(case: Case) -> None:
    """Rows 3 and 30 have NaN or infinite logits: NaN there, and what it would be elsewhere; or an error."""
    marks = torch.zeros_like(case.hidden)
    marks[3, 5], marks[30, 0] = torch.nan, torch.inf
    arguments = (case.weight, case.targets)
    with pytest.raises(NonFiniteError, match="in 2 rows, the first is 3"):
        fused_logprobs(case.hidden + marks, *arguments, vocab_size=VOCABULARY)
    for block in (0, 1 << 20):
        sizes = {"vocab_size": VOCABULARY, "block_bytes": block, "keep_bytes": 0}
        found = fused_logprobs(case.hidden + marks, *arguments, check_finite=False, **sizes).logprobs_N
        truth = fused_logprobs(case.hidden, *arguments, **sizes).logprobs_N
        assert found.isnan().nonzero()[:, 0].tolist() == [3, 30]
        assert torch.equal(torch.where(found.isnan(), truth, found), truth)


@every_dtype
def test_rows_that_are_not_finite_are_nan_where_nobody_looks(dtype: torch.dtype) -> None:
    check_not_finite(make_case(dtype))


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_other_mistakes_are_no_non_finite_numbers(value: float) -> None:
    """A wrong shape or target is an InputError of its own, also beside numbers that are not finite."""
    case = make_case(torch.float32)
    hidden = torch.full_like(case.hidden, value)
    for targets in (torch.full((TOKENS,), 900), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(InputError, match="targets_N") as caught:
            fused_logprobs(hidden, case.weight, targets, vocab_size=VOCABULARY, check_finite=False)
        assert caught.type is InputError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets_N": torch.full((TOKENS,), 900)}, "targets_N holds 900 to 900; expected 0 to 899"),
        ({"targets_N": torch.zeros(3, dtype=torch.int64)}, r"targets_N has shape \[3\]; expected \[37\]"),
        ({"hidden_NH": torch.zeros(TOKENS, 8)}, r"hidden_NH has shape \[37, 8\] .* expected the same H and dtype"),
        ({"hidden_NH": torch.zeros(TOKENS, HIDDEN).double()}, "expected the same H and dtype"),
        ({"hidden_NH": torch.zeros(TOKENS)}, r"hidden_NH has shape \[37\]"),
        ({"weight_VH": torch.zeros(ROWS, HIDDEN).long()}, "weight_VH has shape .* dtype torch.int64"),
        ({"vocab_size": 1001}, "vocab_size is 1001; expected 1 to 1000"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"hidden_NH": torch.full((TOKENS, HIDDEN), torch.nan)}, "in 37 rows, the first is 0"),
    ],
)
def test_wrong_input_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    case = make_case(torch.float32)
    arguments = {"hidden_NH": case.hidden, "weight_VH": case.weight, "targets_N": case.targets} | {"vocab_size": 900}
    with pytest.raises(InputError, match=message):
        fused_logprobs(**arguments | changes)
    with pytest.raises(InputError, match=message):
        fused_cross_entropy(**arguments | {"weights_N": torch.ones(TOKENS)} | changes)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which some builds of torch lack")
def test_triton_kernels_in_their_interpreter() -> None:
    """The same checks with the kernels run by Triton's interpreter on CPU.

    In a process of its own: the interpreter must be chosen before the kernels are imported.
    """
    program = Path(__file__).parent / "triton_interpreter.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, str(program)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "only 0-dimensional arrays can be converted to Python scalars" in result.stderr:
        pytest.skip("NumPy since 2.4 refuses how the interpreter of Triton 3.6 makes the bounds of loops")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["ran", "16"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every_dtype
@pytest.mark.parametrize("entropy", [False, True])
def test_cuda_equals_float64(dtype: torch.dtype, entropy: bool) -> None:
    case = make_case(dtype, "cuda")
    check_logprobs(case, temperature=0.7, block=256, keep=1, entropy=entropy)
    check_cross_entropy(case, temperature=0.7, rows=16)
    check_expanded_gradient(case)
    check_not_finite(case)
