"""Moves weights from a trainer to a live engine, and checks by log-probs that both now hold the same model."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align_core.contracts import WeightSink, WeightSource
from align_core.errors import SyncError
from align_core.types import Completion, chunked

_CHUNK_BYTES = 64 << 20  # small enough to overlap, large enough that a 7B model takes a few hundred calls


def synchronise(source: WeightSource, sink: WeightSink, *, version: int) -> None:
    """After this the engine answers with the trainer's current weights, under `version`.

    Raises:
        SyncError: a weight is missing, unknown, misshapen or damaged on the way; it is named.
    """
    sink.begin(source.metadata(), version)
    for chunk in chunked(source.iterate(), chunk_bytes=_CHUNK_BYTES):
        sink.load(chunk)
    sink.commit()


def check_versions(completions: Sequence[Completion], *, version: int) -> None:
    """Raises SyncError if other weights than those of `version` sampled a completion."""
    found = sorted({completion.version for completion in completions} - {version})
    if found:
        raise SyncError(f"the engine sampled with weight versions {found} after version {version} was committed")


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """|log-prob of the engine - log-prob of the trainer| over the sampled tokens, nats."""

    mean: float
    p99: float
    max: float


def compare_logprobs(
    engine_N: NDArray[np.float32], trainer_N: NDArray[np.float32], *, threshold: float, version: int
) -> Canary:
    """The difference between engine and trainer on the same tokens; both are float32 [N], at temperature 1.

    Raises:
        SyncError: the mean is beyond `threshold`, or a value is not finite.
    """
    bad = int(np.sum(~np.isfinite(engine_N) | ~np.isfinite(trainer_N)))
    if bad:
        raise SyncError(
            f"{bad} of {len(engine_N)} log-probs of tokens sampled by weight version {version} are not finite; "
            "the weights have diverged: lower optimizer.lr and start again from an earlier checkpoint"
        )
    difference = np.abs(engine_N.astype(np.float64) - trainer_N.astype(np.float64))
    canary = Canary(
        mean=float(difference.mean()), p99=float(np.quantile(difference, 0.99)), max=float(difference.max())
    )
    check_canary(
        canary.mean,
        threshold=threshold,
        version=version,
        tokens=f"{len(difference)} tokens",
        further=f", p99 {canary.p99:.4g}, max {canary.max:.4g}",
    )
    return canary


def check_canary(mean: float, *, threshold: float, version: int, tokens: str = "the tokens", further: str = "") -> None:
    """Raises SyncError if the mean |log-prob difference| of engine and trainer, nats, is beyond `threshold`."""
    if mean > threshold:
        raise SyncError(
            f"engine and trainer disagree on the log-probs of {tokens} sampled by weight version {version}: "
            f"mean {mean:.4g}{further} nats, allowed mean {threshold:g}; use the same dtype in training and engine, or "
            "raise canary_threshold if you know why"
        )
