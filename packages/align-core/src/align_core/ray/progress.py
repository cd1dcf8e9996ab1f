"""What each rank is doing, known even of one that hangs or has died.

Every worker notes its activity on a board, an actor of its own, about once a second. When a call fails, the driver
reads the board and says which rank waited for whom: a collective that times out on rank 0 is usually rank 3's doing.
"""

import dataclasses
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import ray

_INTERVAL_S = 1.0
_SILENT_AFTER_S = 4.0  # a worker that noted nothing for so long is stopped, dead, or cut off
_COLLECTIVE = (
    "torch/distributed/distributed_c10d",
    "megatron/core/pipeline_parallel/p2p_communication",
    "megatron/core/distributed/param_and_grad_buffer",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """One worker at one moment."""

    method: str
    """The call it is in, or its last one; empty before the first."""
    call: int
    """How many calls it has begun."""
    busy: bool
    """Whether it is in that call."""
    seconds: float
    """How long it has been in this state."""
    where: str = ""
    """Innermost place of ours on its stack, and the function that is called there."""
    waiting: bool = False
    """Whether its stack ends in a collective operation, which waits for other ranks."""
    failed: bool = False
    """Whether the call ended in an error."""
    age: float = 0.0
    """Seconds since it noted this."""

    @property
    def silent(self) -> bool:
        """Whether it stopped noting anything."""
        return self.age > _SILENT_AFTER_S

    def __str__(self) -> str:
        ordinal = f"{self.method or 'its start'} (call {self.call})"
        state = f"{'in' if self.busy else 'idle after'} {ordinal} for {self.seconds:.0f} s"
        if self.failed:
            state = f"failed in {ordinal} after {self.seconds:.0f} s"
        verb = "waiting for other ranks in" if self.waiting else "at"
        place = f", {verb} {self.where}" if self.where else ""
        return f"{state}{place}" + (f"; silent since {self.age:.0f} s" if self.silent else "")


class Board:
    """Lives in an actor; holds the newest activity of every worker."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[float, Activity]] = {}

    def note(self, worker: str, activity: Activity) -> None:
        """Replaces what is known of `worker`."""
        self._latest[worker] = (time.monotonic(), activity)

    def read(self, workers: Sequence[str]) -> dict[str, Activity]:
        """The activities of those `workers` that noted one, with their ages."""
        now = time.monotonic()
        known = {worker: self._latest[worker] for worker in workers if worker in self._latest}
        return {worker: dataclasses.replace(activity, age=now - at) for worker, (at, activity) in known.items()}


class Heartbeat:
    """Runs in a worker: notes what the thread that made it is doing."""

    def __init__(self, board: Any, worker: str) -> None:
        self._board, self._worker = board, worker
        self._thread_id = threading.get_ident()
        self._began = time.monotonic()
        self._state = Activity(method="", call=0, busy=False, seconds=0.0)
        self._stopped = threading.Event()
        threading.Thread(target=self._run, name="align-heartbeat", daemon=True).start()

    def begin(self, method: str) -> None:
        """A call begins, on the calling thread."""
        self._thread_id = threading.get_ident()
        self._began = time.monotonic()
        self._state = Activity(method=method, call=self._state.call + 1, busy=True, seconds=0.0)

    def end(self, failed: BaseException | None = None) -> None:
        """The call is over; an error leaves its place behind."""
        state, now = self._state, time.monotonic()
        if failed is None:
            self._state = dataclasses.replace(state, busy=False)
        else:
            where, waiting = locate(_innermost(failed))
            self._state = dataclasses.replace(
                state, busy=False, failed=True, seconds=now - self._began, where=where, waiting=waiting
            )
            self._note()  # now: the driver will ask at once
        self._began = now

    def now(self) -> Activity:
        """What is going on at this moment."""
        state = self._state
        if state.failed:
            return state
        where, waiting = locate(sys._current_frames().get(self._thread_id)) if state.busy else ("", False)
        return dataclasses.replace(state, seconds=time.monotonic() - self._began, where=where, waiting=waiting)

    def _note(self) -> None:
        self._board.note.remote(self._worker, self.now())

    def _run(self) -> None:
        while not self._stopped.wait(_INTERVAL_S):
            try:
                self._note()
            except Exception:  # the driver is gone, and the board with it: nobody is left to tell
                return


def _innermost(error: BaseException) -> FrameType | None:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame if trace is not None else None


def locate(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost frame of this project with the function that it calls, and whether that is a collective."""
    called, waiting = "", False
    while frame is not None:
        code = frame.f_code
        if "/align_" in code.co_filename and "/ray/" not in code.co_filename:
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
            return (f"{called} called from {place}" if called else place), waiting
        collective = any(part in code.co_filename for part in _COLLECTIVE)
        if collective or not (waiting or code.co_name.startswith(("_", "<"))):
            called = code.co_name
        waiting = waiting or collective
        frame = frame.f_back
    return (called if waiting else ""), waiting


def describe(activities: Mapping[int, Activity], *, ranks: int, dead: Sequence[int] = ()) -> str:
    """One line a rank, after a line that says who waited for whom."""
    lines = []
    for rank in range(ranks):
        activity = activities.get(rank)
        known = str(activity) if activity else "never heard of"
        lines.append(f"  rank {rank}: {'dead; was ' if rank in dead else ''}{known}")
    return "\n".join(["what the ranks were doing:", *lines, *_who_waits(activities, ranks=ranks, dead=dead)])


def _who_waits(activities: Mapping[int, Activity], *, ranks: int, dead: Sequence[int]) -> list[str]:
    waiting = [r for r, a in activities.items() if a.waiting and not a.silent and r not in dead]
    others = [rank for rank in range(ranks) if rank not in waiting]
    if not waiting or not others:
        return []
    return [f"{_ranks(sorted(waiting))} waited for {_ranks(others)}"]


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"


def make_board() -> Any:
    """The board's actor, on this node where it may start at once."""
    return ray.remote(Board).options(num_cpus=0, max_concurrency=1).remote()
