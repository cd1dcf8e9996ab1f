"""Checks of a trainer: log-probs, updates, weights, and continuing from what was saved."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from align_core.config import LossConfig
from align_core.conformance.expectations import expect, expect_close, largest_difference
from align_core.conformance.weights import check_weight_source
from align_core.contracts import SupportsClose, SupportsEvaluation, Trainer
from align_core.types import Batch


def check_trainer(
    make_trainer: Callable[[], Trainer], *, batch: Batch, loss: LossConfig, folder: Path, tolerance: float = 1e-5
) -> None:
    """Log-probs, updates, weights, and saving and loading of a trainer.

    Args:
        make_trainer: gives equal trainers each time it is called.
        batch: sequences with the columns that `loss` needs.
        folder: an empty directory to save in.
        tolerance: largest difference of log-probs, nats, between trainers in the same state.
    """
    trainer = make_trainer()
    try:
        before = _check_logprobs(trainer, batch)
        check_weight_source(trainer.weights())
        _check_evaluation(trainer, batch, loss)
        _check_step(trainer, batch, loss)
        after = _check_logprobs(trainer, batch)
        expect(largest_difference(before, after) > 0, "step() changed no log-prob")
        state = {"step": "1", "note": "a\nb"}
        trainer.save(folder / "saved", state)
        _check_step(trainer, batch, loss)
        further = _check_logprobs(trainer, batch)
    finally:
        _close(trainer)
    restored = make_trainer()
    try:
        expect(dict(restored.load(folder / "saved")) == state, "load() does not return the state that was saved")
        expect_close(_check_logprobs(restored, batch), after, tolerance, "a loaded trainer scores unlike the saved one")
        _check_step(restored, batch, loss)
        expect_close(_check_logprobs(restored, batch), further, tolerance, "after load() the next step differs")
    finally:
        _close(restored)


def _check_logprobs(trainer: Trainer, batch: Batch) -> NDArray[np.float32]:
    found = trainer.logprobs(batch)
    expect(found.shape == batch.tokens.shape, f"logprobs() has shape {found.shape} for {len(batch.tokens)} tokens")
    expect(found.dtype == np.float32, f"logprobs() is {found.dtype}, not float32")
    expect(bool(np.all(np.isfinite(found) & (found <= 0))), "logprobs() has values above 0 or not finite")
    expect(bool(np.all(found[batch.offsets[:-1]] == 0)), "the first token of a sequence must have log-prob 0")
    backwards = trainer.logprobs(batch.select(np.arange(len(batch))[::-1].astype(np.int64)))
    parts = [backwards[end - length : end] for end, length in zip(np.cumsum(batch.lengths[::-1]), batch.lengths[::-1])]
    expect_close(np.concatenate(parts[::-1]), found, 1e-4, "log-probs depend on the order of the sequences")
    return found


def _check_evaluation(trainer: Trainer, batch: Batch, loss: LossConfig) -> None:
    if not isinstance(trainer, SupportsEvaluation):
        return
    before = trainer.logprobs(batch)
    metrics = trainer.evaluate(batch, loss)
    expect("loss" in metrics, f"evaluate() reports {sorted(metrics)}, but no 'loss'")
    expect(bool(np.array_equal(trainer.logprobs(batch), before)), "evaluate() changed a log-prob")


def _check_step(trainer: Trainer, batch: Batch, loss: LossConfig) -> None:
    metrics = trainer.step(batch, loss)
    for name in ("loss", "grad_norm", "lr"):
        expect(name in metrics, f"step() reports {sorted(metrics)}, but no {name!r}")
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    expect(not bad, f"step() reports values that are not finite: {bad}")


def _close(trainer: Trainer) -> None:
    if isinstance(trainer, SupportsClose):
        trainer.close()
        trainer.close()
