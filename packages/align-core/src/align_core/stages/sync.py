"""Moves weights from a trainer to a live engine, and checks by log-probs that both now hold the same model."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from align_core.config import Verify
from align_core.contracts import DirectSink, DirectSource, WeightSink, WeightSource
from align_core.errors import SyncError
from align_core.transfer.rectangles import Rows, check_sums
from align_core.types import Completion, chunked

_CHUNK_BYTES = 64 << 20  # small enough to overlap, large enough that a 7B model takes a few hundred calls


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one weight update cost."""

    bytes: int
    """Of all weights, once."""
    seconds: Mapping[str, float]
    """`total` and its parts `begin`, `send` and `commit`. On the direct way also `offer` (the trainer's part),
    `compare` (of checksums), and of `send` what the slowest engine took to `open` that memory, `copy` and `sum`."""


def synchronise(
    source: WeightSource, sink: WeightSink, *, version: int, verify: Verify = "sampled", direct: bool = True
) -> SyncReport:
    """After this the engine answers with the trainer's current weights, under `version`.

    Where the engine can read the trainer's memory it does, and what it then holds is compared with what the trainer
    holds by checksums that each computes on its device. Otherwise the weights go through the host's memory, every byte
    checked on arrival.

    Args:
        verify: on the direct way, which rows of each weight the checksums cover.
        direct: False goes through the host's memory even where the direct way is open.
    Raises:
        SyncError: a weight is missing, unknown, misshapen or damaged on the way; it is named.
    """
    started = time.perf_counter()
    metadata = source.metadata()
    sink.begin(metadata, version)
    seconds = {"begin": time.perf_counter() - started}
    if (
        direct
        and isinstance(source, DirectSource)
        and isinstance(sink, DirectSink)
        and source.devices() <= sink.devices()
    ):
        seconds |= _pull(source, sink, version=version, verify=verify)
    else:
        sent = time.perf_counter()
        for chunk in chunked(source.iterate(), chunk_bytes=_CHUNK_BYTES):
            sink.load(chunk)
        seconds["send"] = time.perf_counter() - sent
    committed = time.perf_counter()
    sink.commit()
    seconds |= {"commit": time.perf_counter() - committed, "total": time.perf_counter() - started}
    return SyncReport(bytes=sum(meta.nbytes for meta in metadata), seconds=seconds)


def _pull(source: DirectSource, sink: DirectSink, *, version: int, verify: Verify) -> dict[str, float]:
    """Has the engine fetch the weights while the trainer sums its own; seconds by phase."""
    rows = {"sampled": Rows.sampled(version), "full": Rows(), "off": None}[verify]
    started = time.perf_counter()
    sink.remember(source)
    memory = source.memory()
    offered = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as beside:
        summing = beside.submit(source.checksums, rows) if rows else None
        pulled = sink.pull(source.layout(), memory, rows)
        sent = summing.result() if summing else []
    fetched = time.perf_counter()
    for engine, layout in zip(pulled, sink.layouts(), strict=True) if rows else ():
        check_sums(sent, engine.sums, layout, version=version)
    inside = {phase: max(engine.seconds[phase] for engine in pulled) for phase in pulled[0].seconds}
    return {
        "offer": offered - started,
        "send": fetched - offered,
        **inside,
        "compare": time.perf_counter() - fetched,
    }


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
