"""Worker processes: actors that run objects of ours, and calls on a group of them.

The first failure is what the caller reads: the error of the rank that caused it (not of those that lost it), with its
role and rank, what every rank was doing, and the end of its log. The others are ended, because the rest of a group
that lost a member waits for it in a collective for ever.
"""

import faulthandler
import logging
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from align_core.errors import AlignError, WorkerError
from align_core.ray import logs, progress
from align_core.ray.logs import Whereabouts
from align_core.ray.shared import opened

# When one rank fails, ranks that wait for it may fail first; so much later the cause has shown itself too.
_GRACE_S = 3.0
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "timed out")


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error on its way from a worker, as text, because not every exception survives pickling."""

    error: AlignError | None
    text: str

    @property
    def lost_peer(self) -> bool:
        """Whether this rank probably failed because another one had."""
        return self.error is None and any(sign in self.text for sign in _LOST_PEER)


class Host:
    """Lives in a worker process and holds the objects that do the work, by name."""

    def __init__(self, board: Any, worker: str, gpus: Sequence[int]) -> None:
        faulthandler.enable()  # a crash in native code leaves its Python stack in the log
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        logging.getLogger("megatron").setLevel(logging.WARNING)  # it lists every parameter
        _see_only(gpus)
        self._targets: dict[str, Any] = {}
        self._heartbeat = progress.Heartbeat(board, worker)

    def whereabouts(self) -> Whereabouts:
        """This process, and where it logs."""
        return logs.here()

    def build(self, target: str, make: Callable[[], Any]) -> Any:
        """Makes an object here, known as `target`; returns nothing of it, or the Failure it ended in."""

        def build() -> None:
            self._targets[target] = make()

        return self._guarded("build", build)

    def call(self, target: str, method: str, answers: bool, *arguments: Any) -> Any:
        """`object.method(*arguments)` if it `answers`, else nothing; or the Failure it ended in."""
        result = self._guarded(method, lambda: getattr(self._targets[target], method)(*opened(arguments)))
        return result if answers or isinstance(result, Failure) else None

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`function(*arguments)` in this process, or the Failure it ended in."""
        return self._guarded(getattr(function, "__name__", "run"), lambda: function(*arguments))

    def drop(self, target: str) -> None:
        """Lets go of an object."""
        close = getattr(self._targets.pop(target, None), "close", None)
        if close is not None:
            self._guarded("close", close)

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        self._heartbeat.begin(name)
        try:
            result = work()
            self._heartbeat.end()
            return result
        except AlignError as error:
            self._heartbeat.end(failed=error)
            return Failure(error=error, text=str(error))
        except Exception as error:
            self._heartbeat.end(failed=error)
            return Failure(error=None, text=traceback.format_exc())


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
        """Starts the processes; `board` is that of `progress.make_board`."""
        self.role = role
        self.places = tuple(places)
        self.users: set[str] = set()
        self._board = board
        self._names = [f"{role} {id(self):x} rank {rank}" for rank in range(len(places))]
        environment = {"env_vars": _worker_environment(cpu_threads)}
        self.actors: list[ActorHandle] = [
            ray.remote(Host)
            .options(
                num_cpus=0,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=place.node_id, soft=False),
                runtime_env=environment,
            )
            .remote(board, name, place.gpus)
            for place, name in zip(places, self._names)
        ]
        self.whereabouts: list[Whereabouts] = []
        self.whereabouts = self.collect([actor.whereabouts.remote() for actor in self.actors], "start")
        here = ray.get_runtime_context().get_node_id()
        self.on_this_node = all(found.node_id == here for found in self.whereabouts)

    def collect(self, pending: Sequence[Any], method: str, *, role: str = "", ranks: Sequence[int] = ()) -> list[Any]:
        """What the calls `pending` of `ranks` (all, if not said) give; the first failure ends all processes.

        Raises:
            WorkerError: a process died, or an error that is not ours, with its rank, traceback and log.
            AlignError: a worker raised it.
        """
        ranks = ranks or range(len(pending))
        order = {reference: index for index, reference in enumerate(pending)}
        results: list[Any] = [None] * len(order)
        waiting = list(pending)
        while waiting:
            found, waiting = _next(waiting)
            if any(isinstance(result, (Failure, RayActorError)) for _, result in found):
                late, _ = ray.wait(waiting, num_returns=len(waiting), timeout=_GRACE_S) if waiting else ([], [])
                found += [(reference, _result(reference)) for reference in late]
                self._fail(role or self.role, method, {ranks[order[reference]]: result for reference, result in found})
            for reference, result in found:
                results[order[reference]] = result
        return results

    def close(self) -> None:
        """Ends the processes."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []

    def _fail(self, role: str, method: str, results: dict[int, Any]) -> None:
        """Ends the processes and raises the error of the rank that is to blame."""
        bad = {rank: result for rank, result in results.items() if isinstance(result, (Failure, RayActorError))}
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
            found = ray.get(self._board.read.remote(self._names), timeout=_GRACE_S)
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
        actors = self.processes.actors
        pending = [actor.build.remote(self.role, make) for actor, make in zip(actors, makers, strict=True)]
        self.processes.collect(pending, "build", role=self.role)

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The method's result on every worker, in rank order."""
        return self._call(method, arguments, answering=len(self))

    def call_first(self, method: str, *arguments: Any) -> Any:
        """The method's result on rank 0; every rank is called, and no other rank's result travels."""
        return self._call(method, arguments, answering=1)[0]

    def call_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The method's result on every worker, each with arguments of its own."""
        pending = [
            actor.call.remote(self.role, method, True, *own)
            for actor, own in zip(self.processes.actors, arguments, strict=True)
        ]
        return self.processes.collect(pending, method, role=self.role)

    def run(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """The function's result in the process of one worker."""
        pending = [self.processes.actors[rank].run.remote(function, *arguments)]
        return self.processes.collect(pending, function.__name__, role=self.role, ranks=[rank])[0]

    def close(self) -> None:
        """Lets go of the objects; the last group to leave its processes ends them."""
        if self.role not in self.processes.users:
            return
        self.processes.users.remove(self.role)
        if not self.processes.users:
            self.processes.close()
            return
        for actor in self.processes.actors:
            actor.drop.remote(self.role)

    def _call(self, method: str, arguments: Sequence[Any], *, answering: int) -> list[Any]:
        pending = [
            actor.call.remote(self.role, method, rank < answering, *arguments)
            for rank, actor in enumerate(self.processes.actors)
        ]
        return self.processes.collect(pending, method, role=self.role)


def _next(waiting: list[Any]) -> tuple[list[tuple[Any, Any]], list[Any]]:
    """Waits until a call has ended; every one that has, with its result, and those that have not."""
    first, waiting = ray.wait(waiting, num_returns=1)
    others, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=0) if waiting else ([], [])
    done = [*first, *others]
    try:
        return list(zip(done, ray.get(done))), waiting
    except RayActorError:  # of one of them; the others have results
        return [(reference, _result(reference)) for reference in done], waiting


def _result(reference: Any) -> Any:
    """What the call gave, or how the worker died."""
    try:
        return ray.get(reference)
    except RayActorError as error:
        return error


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


def _see_only(gpus: Sequence[int]) -> None:
    """Hides the node's other GPUs from this process, before CUDA starts in it.

    Not through Ray's own shares of GPUs: an engine over several GPUs that trainers use too cannot be asked for so.
    """
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else [str(index) for index in range(max(gpus) + 1)]
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[index] for index in gpus)
