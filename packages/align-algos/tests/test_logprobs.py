"""Log-probabilities and entropy against torch's own softmax in float64."""

import importlib
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from align_algos import InputError, softmax_blocks, token_entropy, token_logprobs

TARGETS = torch.tensor([0, 3, 5, 2, 2])


def make_logits(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[5, 8]; the last two columns play the padding of the vocabulary where a test says vocab_size 6."""
    return (3 * torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def reference_logprobs(logits: Tensor, vocab_size: int, temperature: float) -> Tensor:
    return (logits[:, :vocab_size].double() / temperature).log_softmax(1).gather(1, TARGETS[:, None])[:, 0]


def reference_entropy(logits: Tensor, vocab_size: int, temperature: float) -> Tensor:
    all_logprobs = (logits[:, :vocab_size].double() / temperature).log_softmax(1)
    return -(all_logprobs.exp() * all_logprobs).sum(1)


def test_values_by_hand() -> None:
    """Logits ln 1, ln 2, ln 5 are probabilities 1/8, 2/8, 5/8; a fourth column is padding and would take mass.

    log p(1) = ln 0.25 = -1.386294;  H = -(.125 ln .125 + .25 ln .25 + .625 ln .625) = 0.900256
    """
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0), 50.0]])
    assert_close(token_logprobs(logits, torch.tensor([1]), vocab_size=3), torch.tensor([-1.386294]))
    assert_close(token_entropy(logits, vocab_size=3), torch.tensor([0.900256]))


@pytest.mark.parametrize("chunk_elements", [1, 13, 1 << 24])
@pytest.mark.parametrize(("vocab_size", "temperature"), [(8, 1.0), (6, 0.7)])
def test_value_and_gradient_equal_float64_whatever_the_chunk(
    vocab_size: int, temperature: float, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(softmax_blocks, "CHUNK_ELEMENTS", chunk_elements)
    logits = make_logits().requires_grad_()
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    scaling = {"vocab_size": vocab_size, "temperature": temperature}
    for result, expected in (
        (token_logprobs(logits, TARGETS, **scaling), reference_logprobs(logits, vocab_size, temperature)),
        (token_entropy(logits, **scaling), reference_entropy(logits, vocab_size, temperature)),
    ):
        assert_close(result, expected)
        (gradient,) = torch.autograd.grad(result @ weights, logits)
        assert_close(gradient, torch.autograd.grad(expected @ weights, logits)[0])
        assert not gradient[:, vocab_size:].any()


def test_gradient_equals_finite_differences() -> None:
    logits = make_logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, TARGETS, vocab_size=6, temperature=0.7), (logits,))
    assert torch.autograd.gradcheck(lambda x: token_entropy(x, vocab_size=6, temperature=0.7), (logits,))


@pytest.mark.parametrize(("dtype", "gradient_tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_low_precision_input_is_accumulated_in_float32(dtype: torch.dtype, gradient_tolerance: float) -> None:
    """Against float64 on the same rounded logits: the value keeps float32's accuracy, the gradient its own dtype's."""
    logits = make_logits(dtype=dtype).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    result = token_logprobs(logits, TARGETS, vocab_size=6)
    expected = reference_logprobs(exact, 6, 1.0)
    assert result.dtype == torch.float32
    assert_close(result.double(), expected, rtol=1e-5, atol=1e-6)
    result.sum().backward()
    expected.sum().backward()
    assert logits.grad.dtype == dtype
    assert_close(logits.grad.double(), exact.grad, rtol=gradient_tolerance, atol=gradient_tolerance / 10)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_large_logits_neither_overflow_nor_lose_the_difference(shift: float) -> None:
    """Two logits 1 apart at +-10,000: log p = -ln(1 + e^-1) = -0.313262, where exp alone gives inf or 0."""
    logits = torch.tensor([[shift, shift + 1.0]])
    assert_close(token_logprobs(logits, torch.tensor([1])), torch.tensor([-0.313262]))
    assert_close(token_entropy(logits), torch.tensor([0.582203]))


def test_masked_logits_of_minus_infinity_are_impossible_tokens() -> None:
    """-inf at a token gives it no mass: two equal logits remain, ln 1/2 each; the gradient is finite."""
    logits = torch.tensor([[1.0, -torch.inf, 1.0]], requires_grad=True)
    assert_close(token_logprobs(logits, torch.tensor([0])).detach(), torch.tensor([-math.log(2.0)]))
    entropy = token_entropy(logits)
    assert_close(entropy.detach(), torch.tensor([math.log(2.0)]))
    (gradient,) = torch.autograd.grad(entropy.sum() + token_logprobs(logits, torch.tensor([0])).sum(), logits)
    assert_close(gradient, torch.tensor([[0.5, 0.0, -0.5]]))


def test_input_is_not_modified_and_need_not_be_contiguous() -> None:
    logits = make_logits(dtype=torch.float32)
    transposed = logits.t().contiguous().t().requires_grad_()
    before = transposed.detach().clone()
    result = token_logprobs(transposed, TARGETS, temperature=0.5) + token_entropy(transposed)
    result.sum().backward()
    assert torch.equal(transposed.detach(), before)
    assert_close(token_logprobs(logits, TARGETS), token_logprobs(transposed, TARGETS).detach())


def test_backward_makes_no_second_float32_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """With chunks of 4 rows no tensor in float32 is larger than a chunk, forward or backward (N 64, V 256, bf16)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and output.dtype == torch.float32:
                largest = max(largest, output.numel())
            return output

    monkeypatch.setattr(softmax_blocks, "CHUNK_ELEMENTS", 4 * 256)
    logits = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with Watch():
        token_logprobs(logits, torch.zeros(64, dtype=torch.int64)).sum().backward()
        token_entropy(logits).sum().backward()
    assert largest == 4 * 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_and_peak_memory_stays_below_one_float32_copy() -> None:
    """4,096 rows of 32,000 columns in bfloat16: 262 MB, their gradient as much, a float32 copy would add 524 MB."""
    logits = torch.randn(4096, 32000, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.arange(4096)
    on_cuda = logits.cuda().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = token_logprobs(on_cuda, targets.cuda())
    (gradient,) = torch.autograd.grad(result.sum(), on_cuda)
    assert torch.cuda.max_memory_allocated() - before - gradient.nbytes < 4096 * 32000 * 4
    assert_close(result.detach()[:64].cpu(), token_logprobs(logits[:64], targets[:64]), rtol=1e-5, atol=1e-5)
    assert_close(token_entropy(on_cuda[:64]).detach().cpu(), token_entropy(logits[:64]), rtol=1e-5, atol=1e-5)


def test_no_rows() -> None:
    logits = torch.zeros(0, 4, requires_grad=True)
    (token_logprobs(logits, torch.zeros(0, dtype=torch.int64)).sum() + token_entropy(logits).sum()).backward()
    assert logits.grad.shape == (0, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets_N": torch.tensor([0, 3, 6, 2, 2])}, "targets_N holds 0 to 6; expected 0 to 5"),
        ({"targets_N": torch.tensor([0, 3, -100, 2, 2])}, "targets_N holds -100 to 3; expected 0 to 5"),
        ({"targets_N": TARGETS[:4]}, r"targets_N has shape \[4\]; expected \[5\]"),
        ({"targets_N": TARGETS.float()}, "targets_N has dtype torch.float32"),
        ({"logits_NV": make_logits()[None]}, r"logits_NV has shape \[1, 5, 8\]"),
        ({"vocab_size": 9}, "vocab_size is 9; expected 1 to 8"),
        ({"vocab_size": 0}, "vocab_size is 0; expected 1 to 8"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"logits_NV": make_logits().index_fill(0, torch.tensor([3]), torch.nan)}, "in 1 rows, the first is 3"),
        ({"logits_NV": make_logits().index_fill(0, torch.tensor([1]), -torch.inf)}, "in 1 rows, the first is 1"),
    ],
)
def test_wrong_input_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    arguments = {"logits_NV": make_logits(), "targets_N": TARGETS, "vocab_size": 6} | changes
    with pytest.raises(InputError, match=message):
        token_logprobs(**arguments)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.mark.parametrize("device_type", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])])
def test_vocabulary_split_over_two_processes_equals_one(
    device_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TP=2: values and gradients of all ways, with padding, with a rank that holds only padding, in three dtypes."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))  # the spawned processes import the worker by name
    worker = importlib.import_module("vocab_parallel_worker")
    arguments = (str(tmp_path / "rendezvous"), device_type)
    torch.multiprocessing.spawn(worker.main, args=arguments, nprocs=worker.RANKS)
