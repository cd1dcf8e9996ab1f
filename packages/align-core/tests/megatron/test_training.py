"""Log-probs, weights and training steps of every layout against Hugging Face and torch's AdamW, float32.

Largest differences seen on two CPU cores: log-probs 1.5e-6 (after five steps), losses 6e-7, gradient norms 2e-7 of
their size. AdamW's eps is 1e-5 here: at the customary 1e-8 a gradient of rounding noise moves a weight by a full step.
"""

from collections.abc import Callable
from math import cos, pi
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_llama import Run, hugging_face, hugging_face_weights, ragged_batch, reference_logprobs, without_rates
from megatron_world import run_ranks
from numpy.typing import NDArray

from align_convert import ModelConfig
from align_core.config import OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext
from align_core.megatron.weights import byte_offsets, total_bytes, weight_metas
from align_core.types import checksum

STEPS = 5
OPTIMIZER = OptimizerConfig(
    lr=2e-3, min_lr=1e-4, schedule="cosine", warmup_steps=2, eps=1e-5, weight_decay=0.1, clip_grad=1.0
)
ONE = ParallelConfig()
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sp": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "dp2": ParallelConfig(data=2),
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2-dp2-sp": ParallelConfig(tensor=2, data=2, sequence=True),
    "tp2-cp2-sp": ParallelConfig(tensor=2, context=2, sequence=True),
}


@pytest.fixture(scope="module")
def reference(llama: Callable[..., Path]) -> Callable[..., Run]:
    """Hugging Face's run of a model, made once."""
    made: dict[Path, Run] = {}

    def run(directory: Path) -> Run:
        if directory not in made:
            made[directory] = _reference_run(directory)
        return made[directory]

    return run


@pytest.mark.parametrize("micro_batch_tokens", [4096, 48, 8], ids=["one-pass", "several", "one-sequence-each"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_one_rank_trains_as_hugging_face(
    llama: Callable[..., Path], reference: Callable[..., Run], tied: bool, micro_batch_tokens: int
) -> None:
    directory = llama(tie_word_embeddings=tied)
    trainer = MegatronTrainer(_config(directory, ONE, micro_batch_tokens))
    try:
        _compare(_train(trainer), reference(directory))
    finally:
        trainer.close()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_as_hugging_face(llama: Callable[..., Path], reference: Callable[..., Run], layout: str) -> None:
    directory = llama()
    runs = run_ranks(_train_rank, LAYOUTS[layout], directory, 48)
    for run in runs:
        _compare(run, reference(directory))
        np.testing.assert_array_equal(run.first, runs[0].first)
        assert run.steps == runs[0].steps


@pytest.mark.parametrize("layout", ["pp2", "tp2-pp2"])
def test_tied_embeddings_train_as_hugging_face_on_two_stages(
    llama: Callable[..., Path], reference: Callable[..., Run], layout: str
) -> None:
    directory = llama(tie_word_embeddings=True)
    _compare(run_ranks(_train_rank, LAYOUTS[layout], directory, 4096)[0], reference(directory))


def test_more_tensor_ranks_than_key_value_heads_score_as_hugging_face(
    llama: Callable[..., Path], reference: Callable[..., Run]
) -> None:
    """2 key heads over 4 ranks: each rank's slice of QKV ends inside a group, and megatron-core gathers."""
    directory = llama()
    found = run_ranks(_logprobs_rank, ParallelConfig(tensor=4), directory)[0]
    np.testing.assert_allclose(found, reference(directory).first, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "rope_scaling",
    [
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        | {"original_max_position_embeddings": 32},
        {"rope_type": "linear", "factor": 4.0},
    ],
    ids=["llama3", "linear"],
)
def test_scaled_rotary_positions_score_as_hugging_face(
    llama: Callable[..., Path], rope_scaling: dict[str, object]
) -> None:
    directory = llama(rope_scaling=rope_scaling)
    trainer = MegatronTrainer(_config(directory, ONE, 4096, trainable=False))
    found = trainer.logprobs(ragged_batch())
    trainer.close()
    with torch.no_grad():
        expected = reference_logprobs(hugging_face(directory), ragged_batch())
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5, rtol=0)


def test_bfloat16_trains_with_float32_main_weights(llama: Callable[..., Path], reference: Callable[..., Run]) -> None:
    """Within bfloat16's 3 digits of float32's losses; weights leave as bfloat16."""
    directory = llama()
    trainer = MegatronTrainer(_config(directory, ONE, 48, dtype="bfloat16"))
    run = _train(trainer)
    metas = trainer.weights().metadata()
    trainer.close()
    losses = [step["loss"] for step in run.steps]
    np.testing.assert_allclose(losses, [step["loss"] for step in reference(directory).steps], atol=0.05)
    assert {meta.dtype for meta in metas} == {"bfloat16"}


@pytest.mark.parametrize("layout", ["tp2", "pp2", "tp2-dp2-sp"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_ranks_write_the_weights_that_they_loaded(
    llama: Callable[..., Path], tmp_path: Path, layout: str, tied: bool
) -> None:
    """Bit for bit, and the ranks' checksums of a tensor add up to that of the tensor."""
    directory = llama(tie_word_embeddings=tied)
    metas = weight_metas(ModelConfig.from_hf(directory), "float32")
    file = tmp_path / "weights"
    file.write_bytes(b"\xff" * total_bytes(metas))
    shares = run_ranks(_write_rank, LAYOUTS[layout], directory, file)
    expected = hugging_face_weights(directory)
    assert sorted(meta.name for meta in metas) == sorted(expected)
    written = np.fromfile(file, np.uint8)
    for meta, offset in zip(metas, byte_offsets(metas)):
        data = written[offset : offset + meta.nbytes]
        np.testing.assert_array_equal(data.view(np.float32).reshape(meta.shape), expected[meta.name])
        assert sum(share.get(meta.name, 0) for share in shares) % 2**64 == checksum(data, item_bytes=4)


def _config(
    directory: Path,
    parallel: ParallelConfig,
    micro_batch_tokens: int,
    *,
    dtype: Any = "float32",
    trainable: bool = True,
) -> TrainerConfig:
    return TrainerConfig(
        model=directory,
        parallel=parallel,
        steps=STEPS,
        trainable=trainable,
        optimizer=OPTIMIZER,
        training=TrainingConfig(micro_batch_tokens=micro_batch_tokens, dtype=dtype, device="cpu"),
    )


def _train(trainer: MegatronTrainer) -> Run:
    first = trainer.logprobs(ragged_batch())
    steps = [without_rates(trainer.step(ragged_batch(seed=step), SftLoss())) for step in range(STEPS)]
    return Run(first=first, steps=steps, last=trainer.logprobs(ragged_batch()))


def _train_rank(context: RankContext, directory: Path, micro_batch_tokens: int) -> Run:
    return _train(MegatronTrainer(_config(directory, context.parallel, micro_batch_tokens), context))


def _logprobs_rank(context: RankContext, directory: Path) -> NDArray[np.float32]:
    trainer = MegatronTrainer(_config(directory, context.parallel, 48, trainable=False), context)
    return trainer.logprobs(ragged_batch())


def _write_rank(context: RankContext, directory: Path, file: Path) -> dict[str, int]:
    trainer = MegatronTrainer(_config(directory, context.parallel, 48, trainable=False), context)
    return trainer.write_weights(file)


def _reference_run(directory: Path) -> Run:
    """The same with transformers and torch.optim.AdamW; norms are not decayed."""
    model = hugging_face(directory)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(OPTIMIZER.beta1, OPTIMIZER.beta2), eps=OPTIMIZER.eps)
    with torch.no_grad():
        first = reference_logprobs(model, ragged_batch()).numpy()
    steps = []
    for number in range(STEPS):
        batch = ragged_batch(seed=number)
        lr = _cosine(number)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        loss = -reference_logprobs(model, batch)[torch.from_numpy(batch.mask)].mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": lr, "tokens": float(len(batch.tokens))})
    with torch.no_grad():
        return Run(first=first, steps=steps, last=reference_logprobs(model, ragged_batch()).numpy())


def _cosine(step: int) -> float:
    """Linear from 0 over the warm-up, then half a cosine to `min_lr` over the rest."""
    if step <= OPTIMIZER.warmup_steps:
        return OPTIMIZER.lr * step / OPTIMIZER.warmup_steps
    done = (step - OPTIMIZER.warmup_steps) / (STEPS - OPTIMIZER.warmup_steps)
    return OPTIMIZER.min_lr + (OPTIMIZER.lr - OPTIMIZER.min_lr) * 0.5 * (1 + cos(pi * done))


def _compare(found: Run, expected: Run) -> None:
    np.testing.assert_allclose(found.first, expected.first, atol=1e-5, rtol=0)
    for step, reference in zip(found.steps, expected.steps, strict=True):
        assert step["loss"] == pytest.approx(reference["loss"], abs=5e-6)
        assert step["nll"] == step["loss"]
        assert step["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert step["lr"] == pytest.approx(reference["lr"], rel=1e-12)
        assert step["tokens"] == reference["tokens"]
    np.testing.assert_allclose(found.last, expected.last, atol=1e-5, rtol=0)
