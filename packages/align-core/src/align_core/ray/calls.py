"""Two ways to call workers and to wait for them: over direct lines on the driver's own node, through Ray beyond it.

A result is what the method gave, the `Failure` it ended in, or the RayActorError of a worker that died.
"""

import contextlib
import pickle
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol, cast

import ray
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError

from align_core.ray.host import Failure, packed
from align_core.ray.lines import Exchange, Line

_DEATH_KNOWN_S = 10.0  # Ray hears of a death later than the line does, and knows more about it

Call = tuple[str, tuple[Any, ...]]
"""A method of `Host` and its arguments."""


class LostWorkersError(Exception):
    """Workers were gone before they could be called: `results` says how, by rank."""

    def __init__(self, results: Mapping[int, Any]) -> None:
        super().__init__(results)
        self.results = dict(results)


class Calls(Protocol):
    """A way to call the workers of some processes."""

    def start(self, calls: Mapping[int, Call]) -> dict[Any, int]:
        """Sends each rank its call; returns what to wait for, and of which rank that is."""
        ...

    def ended(self, waiting: dict[Any, int], timeout_s: float | None) -> dict[int, Any]:
        """Waits until a call has ended; takes all that have out of `waiting` and returns the results by rank."""
        ...

    def close(self) -> None:
        """Nothing is called any more; a thread that waits is told that the workers are dead."""
        ...


class ActorCalls:
    """Through Ray: to any node; calls of one worker queue there."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        self._actors = actors

    def start(self, calls: Mapping[int, Call]) -> dict[Any, int]:
        """See `Calls`."""
        return {
            getattr(self._actors[rank], method).remote(*arguments): rank for rank, (method, arguments) in calls.items()
        }

    def ended(self, waiting: dict[Any, int], timeout_s: float | None) -> dict[int, Any]:
        """See `Calls`."""
        done, others = ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        done += ray.wait(others, num_returns=len(others), timeout=0)[0] if others else []
        try:
            results = ray.get(done)
        except RayActorError:  # of one of them; the others have results
            results = [_result(reference) for reference in done]
        return {waiting.pop(reference): result for reference, result in zip(done, results, strict=True)}

    def close(self) -> None:
        """See `Calls`."""


class LineCalls:
    """Over lines: one call of a worker at a time. Arguments that several ranks share are packed once."""

    def __init__(self, actors: Sequence[ActorHandle]) -> None:
        """Has every worker call in.

        Raises:
            LostWorkersError: workers died meanwhile.
        """
        exchange = Exchange()
        try:
            self._serving = [
                actor.serve.remote(exchange.address, exchange.secret, rank) for rank, actor in enumerate(actors)
            ]
            self._lines = exchange.accept(len(actors), self._check)
        finally:
            exchange.close()
        self._in_use = threading.Lock()  # a thread that closes the lines may not be the one that waits on them
        self._closed = False

    def start(self, calls: Mapping[int, Call]) -> dict[Any, int]:
        """See `Calls`."""
        messages = {id(call): packed(call) for call in calls.values()}
        waiting: dict[Any, int] = {}
        for rank, call in calls.items():
            with contextlib.suppress(OSError):  # it is gone; reading from the line says so
                self._lines[rank].send(messages[id(call)])
            waiting[self._lines[rank]] = rank
        return waiting

    def ended(self, waiting: dict[Any, int], timeout_s: float | None) -> dict[int, Any]:
        """See `Calls`."""
        with self._in_use:
            found = list(waiting) if self._closed else cast("list[Line]", wait(list(waiting), timeout_s))
            messages = {waiting.pop(line): line.receive() for line in found}
        return {rank: self._result(rank, message) for rank, message in messages.items()}

    def close(self) -> None:
        """See `Calls`."""
        for line in self._lines:
            line.hang_up()  # ends a wait
        with self._in_use:
            self._closed = True
            for line in self._lines:
                line.close()

    def _result(self, rank: int, message: bytearray | None) -> Any:
        if message is None:
            return self._death(rank)
        return pickle.loads(message)  # noqa: S301  (from a worker of this run, which said the secret)

    def _death(self, rank: int) -> RayActorError | Failure:
        try:
            ray.get(self._serving[rank], timeout=_DEATH_KNOWN_S)
        except RayActorError as error:
            return error
        except GetTimeoutError:
            return ActorDiedError()
        except Exception as error:  # this asks why a worker is gone: whatever comes is what is known
            return Failure(error=None, text=str(error))
        return ActorDiedError()

    def _check(self) -> None:
        over, _ = ray.wait(self._serving, num_returns=len(self._serving), timeout=0)
        if over:
            raise LostWorkersError(
                {self._serving.index(reference): self._death(self._serving.index(reference)) for reference in over}
            )


def _result(reference: Any) -> Any:
    """What the call gave, or how the worker died."""
    try:
        return ray.get(reference)
    except RayActorError as error:
        return error
