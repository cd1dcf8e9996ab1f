"""Fifty steps of SFT and of DPO: the loss curve of Hugging Face and torch's AdamW, step by step, under every layout.

float32, within 1e-4. AdamW's eps is 1e-5: at 1e-8 a gradient of rounding noise moves a weight by a full step.
"""

from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron_llama import hugging_face, ragged_batch, reference_logprobs
from megatron_world import run_ranks

from align_core.config import DpoLoss, OptimizerConfig, ParallelConfig, SftLoss, TrainerConfig, TrainingConfig
from align_core.megatron import MegatronTrainer, RankContext
from align_core.types import Batch

STEPS = 50
LENGTHS = (5, 17, 9, 20, 12, 6, 24, 9)  # four pairs
BATCHES = 5  # the data of step n is that of step n - 5: a curve that falls
SETTINGS = {"num_hidden_layers": 4}
OPTIMIZER = OptimizerConfig(lr=1e-3, schedule="constant", eps=1e-5, weight_decay=0.1, clip_grad=1.0)
BETA = 0.1

pytestmark = pytest.mark.slow

ONE = ParallelConfig()
VARIANTS: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "one-pass": (ONE, {"micro_batch_tokens": 4096}),
    "packed-several": (ONE, {"micro_batch_tokens": 48}),
    "micro-batch-1": (ONE, {"micro_batch_tokens": 1}),
    "recompute-full": (ONE, {"recompute": "full"}),
    "recompute-selective": (ONE, {"recompute": "selective"}),
    "tp2": (ParallelConfig(tensor=2), {}),
    "tp2-sp": (ParallelConfig(tensor=2, sequence=True), {"recompute": "full"}),
    "pp2": (ParallelConfig(pipeline=2), {"micro_batch_tokens": 48}),
    "pp2-vpp2": (ParallelConfig(pipeline=2, virtual=2), {"micro_batch_tokens": 48}),
    "dp2": (ParallelConfig(data=2), {"micro_batch_tokens": 48}),
    "cp2": (ParallelConfig(context=2), {"micro_batch_tokens": 48}),
    "tp2-pp2": (ParallelConfig(tensor=2, pipeline=2), {"micro_batch_tokens": 48}),
}


@pytest.fixture(scope="module")
def reference(llama: Callable[..., Path]) -> dict[str, list[float]]:
    """Both curves of Hugging Face."""
    return {"sft": _reference(llama(**SETTINGS), dpo=False), "dpo": _reference(llama(**SETTINGS), dpo=True)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_curves_equal_hugging_face(llama: Callable[..., Path], reference: dict[str, list[float]], variant: str) -> None:
    parallel, training = VARIANTS[variant]
    curves = run_ranks(_curves, parallel, llama(**SETTINGS), training)[0]
    for name, losses in reference.items():
        np.testing.assert_allclose(curves[name], losses, atol=1e-4, rtol=0, err_msg=name)


def test_the_curves_fall_and_the_first_dpo_loss_is_ln_2(reference: dict[str, list[float]]) -> None:
    assert reference["dpo"][0] == pytest.approx(log(2), abs=1e-6)
    for losses in reference.values():
        assert np.mean(losses[-BATCHES:]) < 0.8 * np.mean(losses[:BATCHES])


def _batch(step: int) -> Batch:
    """Pairs for DPO, and as many sequences for SFT."""
    batch = ragged_batch(seed=step % BATCHES, lengths=LENGTHS)
    return batch.with_columns(sequences={"group": np.repeat(np.arange(len(LENGTHS) // 2), 2)})


def _curves(context: RankContext, directory: Path, training: dict[str, Any]) -> dict[str, list[float]]:
    config = TrainerConfig(
        model=directory,
        parallel=context.parallel,
        steps=STEPS,
        optimizer=OPTIMIZER,
        training=TrainingConfig(device="cpu", **training),
    )
    curves = {}
    for name in ("sft", "dpo"):
        trainer = MegatronTrainer(config, context)
        given = [trainer.logprobs(_batch(step)) for step in range(BATCHES)]
        curves[name] = []
        for step in range(STEPS):
            batch = _batch(step).with_columns(tokens={"reference_logprobs": given[step % BATCHES]})
            loss = SftLoss() if name == "sft" else DpoLoss(beta=BETA)
            curves[name].append(trainer.step(batch, loss)["loss"])
        trainer.close()
    return curves


def _reference(directory: Path, *, dpo: bool) -> list[float]:
    model = hugging_face(directory)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": OPTIMIZER.weight_decay},
    ]
    optimizer = torch.optim.AdamW(groups, lr=OPTIMIZER.lr, betas=(0.9, 0.95), eps=OPTIMIZER.eps)
    batches = [_batch(step) for step in range(BATCHES)]
    with torch.no_grad():
        given = [reference_logprobs(model, batch) for batch in batches]
    losses = []
    for step in range(STEPS):
        batch = batches[step % BATCHES]
        optimizer.zero_grad()
        found = reference_logprobs(model, batch)
        mask = torch.from_numpy(batch.mask)
        if dpo:
            rewards = torch.stack([part.sum() for part in ((found - given[step % BATCHES]) * mask).split(LENGTHS)])
            loss = -torch.nn.functional.logsigmoid(BETA * (rewards[0::2] - rewards[1::2])).mean()
        else:
            loss = -found[mask].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)
        optimizer.step()
        losses.append(loss.item())
    return losses
