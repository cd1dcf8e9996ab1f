"""Worker processes: actors that run objects of ours, and calls on a group of them.

The first failure is what the caller reads: the error of the rank that caused it (not of those that lost it), with its
role and rank, what every rank was doing, and the end of its log. The others are ended, because the rest of a group
that lost a member waits for it in a collective for ever.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align_core.errors import AlignError, WorkerError
from align_core.ray import logs, progress
from align_core.ray.calls import ActorCalls, Call, Calls, LineCalls, LostWorkersError
from align_core.ray.host import Failure, Host
from align_core.ray.logs import Whereabouts

# When one rank fails, ranks that wait for it may fail first; so much later the cause has shown itself too.
_GRACE_S = 3.0
_BOARD_S = 10.0  # the board's process may still be starting when the first call fails


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where one worker lives, and what it may use."""

    node_id: str
    """Ray's id of its node."""
    gpus: tuple[int, ...] = ()
    """Which of its node's GPUs it sees; none on CPU."""


class Processes:
    """Actors, one a place, which live and die together; several worker groups may use them."""

    def __init__(self, role: str, places: Sequence[Place], *, board: Any, cpu_threads: int = 1) -> None:
        """Starts the processes and returns at once; `board` is that of `progress.make_board`."""
        self.role = role
        self.places = tuple(places)
        self.users: set[str] = set()
        self._board = board
        self._names = [f"{role} {id(self):x} rank {rank}" for rank in range(len(places))]
        environment = _worker_environment(cpu_threads)
        self.actors: list[ActorHandle] = [
            ray.remote(Host)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node_id, soft=False),
            )
            .remote(board, name, place.gpus, environment)
            for place, name in zip(places, self._names)
        ]
        self._calls: Calls = ActorCalls(self.actors)
        self._lock = threading.Lock()
        self._lost = False  # an answer that no one has read may still come
        self.whereabouts: list[Whereabouts] = []
        """By rank; none before the first call, which waits until all have started."""

    @property
    def on_this_node(self) -> bool:
        """Whether all of them share a node with the caller."""
        with self._lock:
            self._meet()
            return self._all_here()

    @property
    def usable(self) -> bool:
        """Whether workers can be called: none has failed, and no call was broken off."""
        return bool(self.actors) and not self._lost

    def ask(self, calls: Mapping[int, Call], method: str, *, role: str = "") -> list[Any]:
        """What the calls of ranks give, in their order; the first failure ends all processes.

        Args:
            method: what errors say was called.
            role: of whom.
        Raises:
            WorkerError: a process died, or an error that is not ours, with its rank, traceback and log.
            AlignError: a worker raised it.
        """
        with self._lock:
            if not self.usable:
                raise WorkerError(f"{role or self.role} cannot be called any more: its processes have ended")
            self._meet()
            self._lost = True
            results = self._gather(calls, method, role or self.role)
            self._lost = False
            return [results[rank] for rank in calls]

    def close(self) -> None:
        """Ends the processes."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        self._calls.close()

    def _meet(self) -> None:
        """Waits until all have started, unless they have before; then calls take the direct way where there is one."""
        if self.whereabouts or not self.usable:
            return
        self._lost = True
        found = self._gather(dict.fromkeys(range(len(self.places)), ("whereabouts", ())), "start", self.role)
        self.whereabouts = [found[rank] for rank in range(len(self.places))]
        if self._all_here():
            try:
                self._calls = LineCalls(self.actors)
            except LostWorkersError as lost:
                self._fail(self.role, "start", lost.results)
        self._lost = False

    def _all_here(self) -> bool:
        here = ray.get_runtime_context().get_node_id()
        return all(found.node_id == here for found in self.whereabouts)

    def _gather(self, calls: Mapping[int, Call], method: str, role: str) -> dict[int, Any]:
        waiting = self._calls.start(calls)
        results: dict[int, Any] = {}
        while waiting:
            found = self._calls.ended(waiting, None)
            if any(_is_bad(result) for result in found.values()):
                deadline = time.monotonic() + _GRACE_S
                while waiting and (left := deadline - time.monotonic()) > 0:
                    found |= self._calls.ended(waiting, left)
                self._fail(role, method, found)
            results |= found
        return results

    def _fail(self, role: str, method: str, results: dict[int, Any]) -> None:
        """Ends the processes and raises the error of the rank that is to blame."""
        bad = {rank: result for rank, result in results.items() if _is_bad(result)}
        rank = min(bad, key=lambda rank: (_blame(bad[rank]), rank))
        found = bad[rank]
        if isinstance(found, Failure) and found.error is not None and type(found.error) is not AlignError:
            self.close()
            raise found.error
        activities = self._activities([rank for rank, result in bad.items() if isinstance(result, RayActorError)])
        log = logs.tail(self.whereabouts[rank]) if self.whereabouts else "  (it died before it could say where it logs)"
        self.close()
        text = (
            f"failed in {method}:\n{found.text}"
            if isinstance(found, Failure)
            else f"died in {method}: process {self._pid(rank)} was killed, ran out of memory, or crashed"
        )
        cause = None if isinstance(found, Failure) else found
        raise WorkerError(f"{role} rank {rank} {text.rstrip()}\n{activities}\nend of its log:\n{log}") from cause

    def _pid(self, rank: int) -> str:
        found = self.whereabouts[rank] if self.whereabouts else None
        return f"{found.pid} on {found.address}" if found else "(which had not started yet)"

    def _activities(self, dead: Sequence[int]) -> str:
        try:
            found = ray.get(self._board.read.remote(self._names), timeout=_BOARD_S)
        except Exception as error:  # the failure itself must be reported, whatever happens to this
            return f"(what the ranks were doing is not known: {type(error).__name__})"
        by_rank = {self._names.index(name): activity for name, activity in found.items()}
        return progress.describe(by_rank, ranks=len(self._names), dead=dead)


class WorkerGroup:
    """One object in each of some processes, called together."""

    def __init__(self, role: str, processes: Processes) -> None:
        """`role` is what errors call it; no other group of the same processes may have it."""
        self.role = role
        self.processes = processes
        processes.users.add(role)

    def __len__(self) -> int:
        return len(self.processes.places)

    @property
    def on_this_node(self) -> bool:
        """Whether all workers share a node with the caller."""
        return self.processes.on_this_node

    def build(self, makers: Sequence[Callable[[], Any]]) -> None:
        """Makes each worker's object in its process."""
        calls = {rank: ("build", (self.role, make)) for rank, make in enumerate(makers)}
        self.processes.ask(calls, "build", role=self.role)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The method's result on every worker, in rank order."""
        return self._call(method, arguments, answering=len(self))

    def call_first(self, method: str, *arguments: Any) -> Any:
        """The method's result on rank 0; every rank is called, and no other rank's result travels."""
        return self._call(method, arguments, answering=1)[0]

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The method's result on every worker, each with arguments of its own."""
        calls = {rank: ("call", (self.role, method, True, *own)) for rank, own in enumerate(arguments)}
        return self.processes.ask(calls, method, role=self.role)

    def run(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result in the process of one worker."""
        return self.processes.ask({rank: ("run", (function, *arguments))}, function.__name__, role=self.role)[0]

    def close(self) -> None:
        """Lets go of the objects; the last group to leave its processes ends them."""
        if self.role not in self.processes.users:
            return
        self.processes.users.remove(self.role)
        if not self.processes.users:
            self.processes.close()
            return
        if self.processes.usable:
            drop: Call = ("drop", (self.role,))
            self.processes.ask(dict.fromkeys(range(len(self)), drop), "close", role=self.role)

    def _call(self, method: str, arguments: Sequence[Any], *, answering: int) -> list[Any]:
        speaking: Call = ("call", (self.role, method, True, *arguments))
        silent: Call = ("call", (self.role, method, False, *arguments))
        calls = {rank: speaking if rank < answering else silent for rank in range(len(self))}
        return self.processes.ask(calls, method, role=self.role)


def _is_bad(result: Any) -> bool:
    return isinstance(result, (Failure, RayActorError))


def _blame(failure: Failure | RayActorError) -> int:
    """0 for a rank's own error, 1 for a death, 2 for an error of one that lost its peer."""
    if isinstance(failure, Failure):
        return 2 if failure.lost_peer else 0
    return 1


def _worker_environment(cpu_threads: int) -> dict[str, str]:
    """The caller's HOME (a private Ray has its own) and a bound on threads, so that ranks do not fight for cores."""
    threads = str(cpu_threads)
    home = {"HOME": os.environ["HOME"]} if "HOME" in os.environ else {}
    return {**home, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
