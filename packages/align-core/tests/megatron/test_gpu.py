"""The same trainer on CUDA and NCCL, against Hugging Face on the CPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_checks import check_rotary, check_swiglu
from megatron.core.transformer import TransformerConfig
from megatron_llama import Run, hugging_face, ragged_batch, reference_logprobs
from megatron_world import run_ranks

from align_core.config import Dtype, OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext
from align_core.megatron.attention import PackedAttention
from align_core.megatron.quiet import quiet_megatron

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
STEPS = 3


@pytest.mark.parametrize(("dtype", "mean", "largest"), [("float32", 1e-5, 1e-4), ("bfloat16", 0.02, 0.3)])
def test_one_device_scores_as_hugging_face(
    llama: Callable[..., Path], dtype: Dtype, mean: float, largest: float
) -> None:
    directory = llama()
    found = run_ranks(_train_rank, ParallelConfig(), directory, dtype, device="cuda")[0].first
    with torch.no_grad():
        expected = reference_logprobs(hugging_face(directory), ragged_batch()).numpy()
    difference = np.abs(found - expected)
    assert difference.mean() < mean
    assert difference.max() < largest


@two_devices
@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(tensor=2, sequence=True), ParallelConfig(pipeline=2), ParallelConfig(data=2)],
    ids=["tp2-sp", "pp2", "dp2"],
)
def test_two_devices_train_as_one(llama: Callable[..., Path], parallel: ParallelConfig) -> None:
    directory = llama()
    one = run_ranks(_train_rank, ParallelConfig(), directory, "float32", device="cuda")[0]
    two = run_ranks(_train_rank, parallel, directory, "float32", device="cuda")[0]
    for step, reference in zip(two.steps, one.steps, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], abs=1e-4)
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-4)
    np.testing.assert_allclose(two.last, one.last, atol=1e-3, rtol=0)


@two_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_continues_on_another_layout(llama: Callable[..., Path], tmp_path: Path, dtype: Dtype) -> None:
    directory = llama()
    saved = run_ranks(_save_rank, ParallelConfig(tensor=2), directory, dtype, tmp_path / "saved", device="cuda")[0]
    loaded = run_ranks(_load_rank, ParallelConfig(pipeline=2), directory, dtype, tmp_path / "saved", device="cuda")[0]
    assert loaded == pytest.approx(saved, abs=1e-4 if dtype == "float32" else 0.03)


def _trainer(context: RankContext, directory: Path, dtype: Dtype, **training: Any) -> MegatronTrainer:
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS + 1,
        optimizer=OptimizerConfig(lr=2e-3, eps=1e-5, weight_decay=0.1),
        training=TrainingConfig(micro_batch_tokens=48, dtype=dtype, device="cuda", **training),
    )
    return MegatronTrainer(config, context)


def _train_rank(context: RankContext, directory: Path, dtype: Dtype) -> Run:
    trainer = _trainer(context, directory, dtype)
    first = trainer.logprobs(ragged_batch())
    steps = [dict(trainer.step(ragged_batch(seed=step), SftLoss())) for step in range(STEPS)]
    return Run(first=first, steps=steps, last=trainer.logprobs(ragged_batch()))


def _save_rank(context: RankContext, directory: Path, dtype: Dtype, path: Path) -> float:
    trainer = _trainer(context, directory, dtype)
    for step in range(STEPS):
        trainer.step(ragged_batch(seed=step), SftLoss())
    trainer.save(path, {})
    return trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]


def _load_rank(context: RankContext, directory: Path, dtype: Dtype, path: Path) -> float:
    trainer = _trainer(context, directory, dtype)
    trainer.load(path)
    return trainer.step(ragged_batch(seed=STEPS), SftLoss())["loss"]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_kernels_equal_torch(dtype: torch.dtype, tolerance: float) -> None:
    check_swiglu("cuda", dtype, tolerance)
    check_rotary("cuda", dtype, tolerance)


def test_the_last_query_sees_the_last_key() -> None:
    """As context parallelism needs it: 5 queries at the end of a sequence of 12, and 3 at the end of one of 3."""
    with quiet_megatron():
        config = TransformerConfig(num_layers=1, hidden_size=128, num_attention_heads=2)
    attention = PackedAttention(config, frequencies=torch.ones(32))
    query = torch.randn(8, 2, 64, device="cuda", dtype=torch.bfloat16)
    key, value = (torch.randn(15, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    bounds = tuple(torch.tensor(b, device="cuda", dtype=torch.int32) for b in ([0, 5, 8], [0, 12, 15]))
    found = attention._varlen(query, key, value, bounds, (5, 12))
    expected = []
    for (q0, q1), (k0, k1) in (((0, 5), (0, 12)), ((5, 8), (12, 15))):
        q, k, v = (x.float().transpose(0, 1) for x in (query[q0:q1], key[k0:k1], value[k0:k1]))
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device="cuda").tril(k1 - k0 - (q1 - q0))
        expected.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(0, 1))
    torch.testing.assert_close(found.float(), torch.cat(expected), atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_recompute_changes_nothing(llama: Callable[..., Path], dtype: Dtype) -> None:
    """Every module of selective recompute, and whole layers, against keeping everything."""
    found = run_ranks(_recompute_rank, ParallelConfig(), llama(), dtype, device="cuda")[0]
    kept, *others = found
    for losses in others:
        assert losses == pytest.approx(kept, rel=1e-5 if dtype == "float32" else 1e-2)


def _recompute_rank(context: RankContext, directory: Path, dtype: Dtype) -> list[list[float]]:
    found = []
    ways: list[dict[str, Any]] = [
        {},
        {"recompute": "full"},
        {"recompute": "selective"},
        {"recompute": "selective", "recompute_modules": ("mlp", "norm", "attention")},
    ]
    for recompute in ways:
        trainer = _trainer(context, directory, dtype, **recompute)
        found.append([trainer.step(ragged_batch(seed=step), SftLoss())["loss"] for step in range(STEPS)])
        trainer.close()
    return found


def test_offloading_frees_the_device_and_changes_nothing(llama: Callable[..., Path]) -> None:
    plain, offloaded, left = run_ranks(_offload_rank, ParallelConfig(), llama(), device="cuda")[0]
    assert offloaded == plain
    assert left == 0


def _offload_rank(context: RankContext, directory: Path) -> tuple[list[float], list[float], int]:
    losses: list[list[float]] = []
    left = 0
    for offload in (False, True):
        trainer = _trainer(context, directory, "bfloat16")
        found = []
        for step in range(STEPS):
            found.append(trainer.step(ragged_batch(seed=step), SftLoss())["loss"])
            if offload:
                trainer.offload()
                left = sum(p.untyped_storage().nbytes() for chunk in trainer._chunks for p in chunk.parameters())
        losses.append(found)
        trainer.close()
    return losses[0], losses[1], left
