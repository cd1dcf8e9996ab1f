"""Moves weights from a trainer to a live engine, and checks by log-probs that both now hold the same model."""

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from align_core.config import Transport, Verify
from align_core.contracts import DirectSink, DirectSource, LinkedSink, LinkedSource, WeightSink, WeightSource
from align_core.errors import ConfigError, SyncError
from align_core.transfer.rectangles import Part, Pulled, Rows, check_sums
from align_core.types import Completion, chunked

Way = Literal["memory", "links", "host"]
_CHUNK_BYTES = 64 << 20  # small enough to overlap, large enough that a 7B model takes a few hundred calls
_DIVERGED = "are not finite; the weights have diverged: lower optimizer.lr and start again from an earlier checkpoint"


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What one weight update cost."""

    way: Way
    """Which one the weights took."""
    bytes: int
    """Of all weights, once."""
    seconds: Mapping[str, float]
    """`total` and its parts `begin`, `send` and `commit`. Unless it went through the host also `offer` (what precedes),
    `compare` (of checksums), and of `send` what the slowest engine took to `open` the trainer's memory, `copy` and
    `sum`, or to `join` the trainer's ranks, `receive` and `sum`."""


def synchronise(
    source: WeightSource,
    sink: WeightSink,
    *,
    version: int,
    verify: Verify = "sampled",
    transport: Transport = "auto",
) -> SyncReport:
    """After this the engine answers with the trainer's current weights, under `version`.

    Where the engine can read the trainer's GPUs it does; where both have GPUs of their own, each rank of the trainer
    sends its parts to the ranks of the engines that need them. What the engines then hold is compared with what the
    trainer holds by checksums that each computes on its device. Otherwise the weights go through the host's memory,
    every byte checked on arrival.

    Args:
        verify: on the first two ways, which rows of each weight the checksums cover.
        transport: see `EngineConfig.transport`.
    Raises:
        SyncError: a weight is missing, unknown, misshapen or damaged on the way; it is named.
        ConfigError: `transport` is a way that is not open.
    """
    started = time.perf_counter()
    metadata = source.metadata()
    way = _way(source, sink, transport)
    sink.begin(metadata, version)
    seconds = {"begin": time.perf_counter() - started}
    if isinstance(source, DirectSource) and isinstance(sink, DirectSink) and way == "memory":
        seconds |= _pull(source, sink, version=version, verify=verify)
    elif isinstance(source, LinkedSource) and isinstance(sink, LinkedSink) and way == "links":
        seconds |= _send(source, sink, version=version, verify=verify)
    else:
        sent = time.perf_counter()
        for chunk in chunked(source.iterate(), chunk_bytes=_CHUNK_BYTES):
            sink.load(chunk)
        seconds["send"] = time.perf_counter() - sent
    committed = time.perf_counter()
    sink.commit()
    seconds |= {"commit": time.perf_counter() - committed, "total": time.perf_counter() - started}
    return SyncReport(way=way, bytes=sum(meta.nbytes for meta in metadata), seconds=seconds)


def _way(source: WeightSource, sink: WeightSink, asked: Transport) -> Way:
    """The way that `asked` means here."""
    reads = isinstance(source, DirectSource) and isinstance(sink, DirectSink) and source.devices() <= sink.devices()
    if asked == "host":
        return "host"
    if reads and asked in ("auto", "memory"):
        return "memory"
    if asked == "memory":
        raise ConfigError(
            "engine.transport is 'memory', but the engine cannot read the trainer's weights where they are; that takes "
            "one replica of vLLM that sees all of the trainer's GPUs: use 'auto'"
        )
    if not (isinstance(source, LinkedSource) and isinstance(sink, LinkedSink)):
        if asked == "auto":
            return "host"
        raise ConfigError(
            "engine.transport is 'links', but these do not send from rank to rank: it takes the engine 'vllm' and a "
            "trainer, both in processes of their own (cluster.in_process false); use 'auto'"
        )
    trainer, engines = source.devices(), sink.devices()
    apart = not trainer & engines and bool(trainer) == bool(engines)
    if asked == "links" and not apart:
        raise ConfigError(
            "engine.transport is 'links', but trainer and engines share GPUs, or one of them has none, and NCCL takes "
            "one rank a GPU; set cluster.placement to 'disaggregated', or engine.transport to 'auto'"
        )
    return "links" if asked == "links" or (trainer and apart) else "host"  # on CPU shared memory is faster


def _pull(source: DirectSource, sink: DirectSink, *, version: int, verify: Verify) -> dict[str, float]:
    """Has the engine fetch the weights while the trainer sums its own; seconds by phase."""
    rows = _rows(verify, version)
    started = time.perf_counter()
    sink.remember(source)
    memory = source.memory()
    offered = time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as beside:
        summing = beside.submit(source.checksums, rows) if rows else None
        pulled = sink.pull(source.layout(), memory, rows)
        sent = summing.result() if summing else []
    fetched = time.perf_counter()
    _compare(sent, pulled, sink.layouts() if rows else (), version=version)
    return {"offer": offered - started, "send": fetched - offered, **_slowest(pulled), "compare": _since(fetched)}


def _send(source: LinkedSource, sink: LinkedSink, *, version: int, verify: Verify) -> dict[str, float]:
    """Has the trainer's ranks send while the engines' receive; seconds by phase."""
    rows = _rows(verify, version)
    started = time.perf_counter()
    sink.remember(source)
    layouts = sink.layouts()
    sink.expect(source.seat(layouts))
    expected = time.perf_counter()
    with ThreadPoolExecutor(max_workers=2) as both:
        sending, receiving = both.submit(source.send, rows), both.submit(sink.receive, rows)
        sides: list[Future[Any]] = [sending, receiving]
        for ended in as_completed(sides):
            ended.result()  # of the two, the error that came first is the cause
        sent, received = sending.result(), receiving.result()
    arrived = time.perf_counter()
    _compare(sent, received, layouts if rows else (), version=version)
    return {"offer": expected - started, "send": arrived - expected, **_slowest(received), "compare": _since(arrived)}


def _rows(verify: Verify, version: int) -> Rows | None:
    return {"sampled": Rows.sampled(version), "full": Rows(), "off": None}[verify]


def _compare(
    sent: Sequence[Mapping[str, int]],
    engines: Sequence[Pulled],
    layouts: Sequence[Sequence[Sequence[Part]]],
    *,
    version: int,
) -> None:
    """Checks each engine that has a layout; SyncError names the weights that differ."""
    for engine, layout in zip(engines, layouts, strict=bool(layouts)):
        check_sums(sent, engine.sums, layout, version=version)


def _slowest(engines: Sequence[Pulled]) -> dict[str, float]:
    return {phase: max(engine.seconds[phase] for engine in engines) for phase in engines[0].seconds}


def _since(moment: float) -> float:
    return time.perf_counter() - moment


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
        raise SyncError(f"{bad} of {len(engine_N)} log-probs of tokens sampled by weight version {version} {_DIVERGED}")
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
    """Raises SyncError if the mean |log-prob difference| of engine and trainer, nats, is beyond `threshold` or NaN."""
    if not math.isfinite(mean):
        raise SyncError(f"log-probs of {tokens} sampled by weight version {version} {_DIVERGED}")
    if mean > threshold:
        raise SyncError(
            f"engine and trainer disagree on the log-probs of {tokens} sampled by weight version {version}: "
            f"mean {mean:.4g}{further} nats, allowed mean {threshold:g}; use the same dtype in training and engine, or "
            "raise canary_threshold if you know why"
        )
