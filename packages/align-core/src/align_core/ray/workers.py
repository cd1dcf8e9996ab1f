"""Worker processes: actors that run an object of ours, and calls on a group of them.

The first failure is what the caller reads: the worker's own error with its role and rank; the others are ended, because
the rest of a group that lost a member waits for it in a collective for ever.
"""

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError

from align_core.errors import AlignError, WorkerError


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An error on its way from a worker, as text, because not every exception survives pickling."""

    error: AlignError | None
    text: str


class Host:
    """Lives in a worker process and holds the one object that does the work."""

    def __init__(self) -> None:
        self._target: Any = None

    def build(self, make: Callable[[], Any]) -> Failure | None:
        """Makes the object here; returns nothing of it."""

        def build() -> None:
            self._target = make()

        result = _guarded(build)
        return result if isinstance(result, Failure) else None

    def call(self, method: str, *arguments: Any) -> Any:
        """`object.method(*arguments)`, or the Failure it ended in."""
        return _guarded(lambda: getattr(self._target, method)(*arguments))


def _guarded(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except AlignError as error:
        return Failure(error=error, text=str(error))
    except Exception:
        return Failure(error=None, text=traceback.format_exc())


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What one worker may use."""

    gpus: float = 0.0
    """Share of a GPU; 0 on CPU."""
    bundle: int = 0
    """Which bundle of the placement group."""


class WorkerGroup:
    """Actors that are called together."""

    def __init__(self, role: str, places: Sequence[Place], *, group: Any, cpu_threads: int = 1) -> None:
        self.role = role
        self._actors: list[ActorHandle] = [
            ray.remote(Host)
            .options(
                num_cpus=0,
                num_gpus=place.gpus,
                max_restarts=0,
                scheduling_strategy=_in_bundle(group, place.bundle),
                runtime_env={"env_vars": _worker_environment(cpu_threads)},
            )
            .remote()
            for place in places
        ]

    def __len__(self) -> int:
        return len(self._actors)

    def build(self, makers: Sequence[Callable[[], Any]]) -> None:
        """Makes each worker's object in its process."""
        self._collect([actor.build.remote(make) for actor, make in zip(self._actors, makers, strict=True)], "build")

    def call(self, method: str, *arguments: Any) -> list[Any]:
        """The method's result on every worker, in rank order."""
        return self._collect([actor.call.remote(method, *arguments) for actor in self._actors], method)

    def close(self) -> None:
        """Ends the processes."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []

    def _collect(self, pending: list[Any], method: str) -> list[Any]:
        rank_of = {reference: rank for rank, reference in enumerate(pending)}
        results: list[Any] = [None] * len(pending)
        while pending:
            (done,), pending = ray.wait(pending, num_returns=1)
            rank = rank_of[done]
            try:
                result = ray.get(done)
            except RayActorError as error:
                self.close()
                raise WorkerError(f"{self.role} rank {rank} died in {method}: {error}") from error
            if isinstance(result, Failure):
                self.close()
                if result.error is not None and type(result.error) is not AlignError:
                    raise result.error
                raise WorkerError(f"{self.role} rank {rank} failed in {method}:\n{result.text}")
            results[rank] = result
        return results


def _in_bundle(group: Any, bundle: int) -> Any:
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy  # noqa: PLC0415

    return PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=bundle)


def _worker_environment(cpu_threads: int) -> dict[str, str]:
    """The caller's HOME (a private Ray has its own) and a bound on threads, so that ranks do not fight for cores."""
    threads = str(cpu_threads)
    home = {"HOME": os.environ["HOME"]} if "HOME" in os.environ else {}
    return {**home, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
