"""Who sits where in a transfer between ranks. Plain data, no torch: the caller of the ranks hands it out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from align_core.transfer.rectangles import Part

Backend = Literal["nccl", "gloo"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Meeting:
    """Where the ranks of a transfer meet: senders are ranks 0 .. senders-1, receivers the ones after them."""

    place: str
    """Of `align_core.transfer.rendezvous`."""
    senders: int
    receivers: int
    backend: Backend
    timeout_s: float = 300.0
    """Longest wait for another rank to send."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seat:
    """Which rank of a meeting a process is, and what both sides hold."""

    meeting: Meeting
    rank: int
    held: Sequence[Sequence[Part]]
    """Of each sender, which parts of which weights it has."""
    wanted: Sequence[Sequence[Part]]
    """Of each receiver, which it needs."""
