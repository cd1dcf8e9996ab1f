"""An engine in processes of its own: replicas with the same weights, the least loaded one takes the next prompt.

A replica that dies is started again, gets the current weights and is asked again for what it had not delivered; a
completion that came before is never delivered twice. Each such event is logged and kept in `RayEngine.events`.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from align_core.columns import from_columns
from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate, SupportsPartial, SupportsSleep, WeightSink
from align_core.errors import DataError, WorkerError
from align_core.ray.engine_host import EngineHost, Packed, Refusal
from align_core.ray.engine_sink import DirectReplicaSink, LinkedReplicaSink, ReplicaSink
from align_core.ray.workers import WorkerGroup
from align_core.types import Completion, Prompt

logger = logging.getLogger(__name__)

MakeHost = Callable[[Path, EngineConfig], EngineHost]
"""(model, settings) -> what `EngineHost` is in an engine's process"""

_RESTARTS = 3  # of one replica; more point to a cause that starting again does not remove
_SLICE_S = 0.2  # a poll leaves the process of an engine free for other calls so often


@dataclass(kw_only=True, slots=True)
class _Asked:
    """A prompt under way."""

    prompt: Prompt
    sampling: SamplingConfig
    replica: "_Replica"
    left: set[int]
    """Samples not delivered yet."""


@dataclass(kw_only=True, slots=True)
class _Replica:
    """One engine process."""

    number: int
    start: Callable[[], WorkerGroup]
    """Makes the process and builds the engine in it."""
    workers: WorkerGroup
    restarts: int = 0
    load: int = 0
    """Tokens that it may still have to process."""

    def ask(self, method: str, *arguments: Any) -> Any:
        """The host's answer; raises its refusal, or _DiedError."""
        try:
            answer = self.workers.call("ask", method, *arguments)[0]
        except WorkerError as error:
            if isinstance(error.__cause__, RayActorError):
                raise _DiedError(str(error)) from error
            raise
        if isinstance(answer, Refusal):
            raise answer.error
        return from_columns(answer.columns) if isinstance(answer, Packed) else answer


class _DiedError(WorkerError):
    """The process of a replica is gone."""


class RayEngine:
    """A `RolloutEngine` over replicas; see the contracts for its methods."""

    def __init__(
        self,
        model: Path,
        config: EngineConfig,
        starts: Sequence[Callable[[], WorkerGroup]],
        *,
        make_host: MakeHost = EngineHost,
    ) -> None:
        """Starts one replica for each of `starts`, which make a worker group with one process.

        Args:
            make_host: what to run in each process instead of an engine of the registry.
        """
        self.events: list[str] = []
        """What happened to replicas, as it was logged."""
        builds = [partial(_build, start, partial(make_host, model, config)) for start in starts]
        self._pool = ThreadPoolExecutor(max_workers=len(builds), thread_name_prefix="align-engine")
        groups = list(self._pool.map(lambda build: build(), builds))
        self._replicas = [
            _Replica(number=number, start=build, workers=workers)
            for number, (build, workers) in enumerate(zip(builds, groups, strict=True))
        ]
        self._asked: dict[int, _Asked] = {}
        self._paused = self._closed = False
        self._sink = self._make_sink()

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """See `align_core.contracts.RolloutEngine`."""
        _refuse_twins(prompts)
        shares: list[list[Prompt]] = [[] for _ in self._replicas]
        loads = [replica.load for replica in self._replicas]
        for prompt in prompts:
            least = loads.index(min(loads))
            shares[least].append(prompt)
            loads[least] += _cost(prompt, sampling)
        pending = [
            self._pool.submit(self._generate_on, replica, share, sampling)
            for replica, share in zip(self._replicas, shares)
            if share
        ]
        wait(pending)
        found = [completion for future in pending for completion in future.result()]
        order = {prompt.id: place for place, prompt in enumerate(prompts)}
        return sorted(found, key=lambda completion: (order[completion.prompt_id], completion.sample))

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self.submit_begun(prompts, sampling, [])

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        """See `align_core.contracts.SupportsPartial`."""
        _refuse_twins(prompts)
        for prompt in prompts:
            if prompt.id in self._asked:
                raise DataError(f"prompt id {prompt.id} is under way already; give every drawn prompt an id of its own")
        chosen: dict[int, list[Prompt]] = {}
        loads = {replica.number: replica.load for replica in self._replicas}
        for prompt in prompts:
            number = min(loads, key=lambda number: loads[number])
            chosen.setdefault(number, []).append(prompt)
            loads[number] += _cost(prompt, sampling)
        for number, share in chosen.items():
            replica, ids = self._replicas[number], {prompt.id for prompt in share}
            own = [completion for completion in begun if completion.prompt_id in ids]
            self._alive(replica, "submit_begun", share, sampling, own)
            for prompt in share:
                whole = {c.sample for c in own if c.prompt_id == prompt.id and c.finish_reason != "abort"}
                if left := set(range(sampling.n)) - whole:
                    self._asked[prompt.id] = _Asked(prompt=prompt, sampling=sampling, replica=replica, left=left)
            replica.load = loads[number]

    def partial(self) -> list[Completion]:
        """See `align_core.contracts.SupportsPartial`."""
        found = [completion for replica in self._replicas for completion in self._alive(replica, "partial")]
        return [c for c in found if c.prompt_id in self._asked and c.sample in self._asked[c.prompt_id].left]

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            found = [completion for replica in self._replicas for completion in self._poll(replica, 0.0)]
            left = None if deadline is None else deadline - time.monotonic()
            if found or self._paused or not self._asked or (left is not None and left <= 0):
                return found
            busy = [replica for replica in self._replicas if replica.load]
            slice_s = (_SLICE_S if left is None else min(_SLICE_S, left)) / max(1, len(busy))
            found = [completion for replica in busy for completion in self._poll(replica, slice_s)]
            if found:
                return found

    def abort(self, prompt_ids: Sequence[int] | None = None) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        for replica in self._replicas:
            self._alive(replica, "abort", None if prompt_ids is None else list(prompt_ids))

    def pause(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._paused = True
        for replica in self._replicas:
            self._alive(replica, "pause")

    def resume(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._paused = False
        for replica in self._replicas:
            self._alive(replica, "resume")

    def weight_sink(self) -> WeightSink:
        """The one sink of all replicas; weights travel as names of mapped files, or as handles of GPU memory."""
        return self._sink

    def sleep(self, *, keep_weights: bool = True) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._ask_all("sleep", keep_weights)

    def wake(self) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._ask_all("wake")

    def close(self) -> None:
        """Ends the processes; calling it again does nothing."""
        self._closed = True
        for replica in self._replicas:
            replica.workers.close()
        self._pool.shutdown()

    def _make_sink(self) -> ReplicaSink:
        first = self._replicas[0]
        kind = ReplicaSink
        if first.ask("links"):
            kind = DirectReplicaSink if len(self._replicas) == 1 and first.ask("pulls") else LinkedReplicaSink
        return kind(self._ask_each, len(self._replicas))

    def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        return self._ask_each(method, [arguments] * len(self._replicas))

    def _ask_each(self, method: str, arguments: Sequence[Sequence[Any]]) -> list[Any]:
        """The answer of every replica, each with its own arguments.

        A death ends it, because weights that are half in need to be sent anew; before the first step of an update the
        replica is started again instead.
        """
        asks = [partial(self._alive, replica) if method == "begin" else replica.ask for replica in self._replicas]
        pending = [self._pool.submit(ask, method, *own) for ask, own in zip(asks, arguments, strict=True)]
        errors = [ended.exception() for ended in as_completed(pending)]  # all end before files of the call go away
        for error in errors:
            if error is not None:  # the first in time: others may have waited for that one in vain
                raise error
        return [future.result() for future in pending]

    def _alive(self, replica: _Replica, method: str, *arguments: Any) -> Any:
        """The answer of a replica, which is started again if it has died."""
        while True:
            try:
                return replica.ask(method, *arguments)
            except _DiedError as death:
                self._restart(replica, death)

    def _generate_on(self, replica: _Replica, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        while True:
            try:
                found: list[Completion] = replica.ask("generate", list(prompts), sampling)
                return found
            except _DiedError as death:
                self._restart(replica, death, again=len(prompts) * sampling.n)

    def _poll(self, replica: _Replica, timeout_s: float) -> list[Completion]:
        """What the replica has delivered, each completion once."""
        new = []
        for completion in self._alive(replica, "poll", timeout_s):
            asked = self._asked.get(completion.prompt_id)
            if asked is None or completion.sample not in asked.left:
                continue  # delivered before the replica died, and sampled once more with its neighbours
            asked.left.remove(completion.sample)
            new.append(completion)
            if not asked.left:
                del self._asked[completion.prompt_id]
                replica.load = max(0, replica.load - _cost(asked.prompt, asked.sampling))
        return new

    def _restart(self, replica: _Replica, death: WorkerError, *, again: int = 0) -> None:
        """A new process with the current weights and the requests that the old one owed."""
        if self._closed:
            raise death  # it was ended, while another thread waited for it
        if replica.restarts == _RESTARTS:
            raise WorkerError(f"engine replica {replica.number} died {_RESTARTS + 1} times; the last time: {death}")
        replica.restarts += 1
        replica.workers.close()
        replica.workers = replica.start()
        version = self._sink.restore(replica.ask)
        owed = [asked for asked in self._asked.values() if asked.replica is replica]
        if self._paused:
            replica.ask("pause")
        for asked in owed:
            replica.ask("submit", [asked.prompt], asked.sampling)
        count = again + sum(len(asked.left) for asked in owed)
        event = (
            f"engine replica {replica.number} died and was started again with "
            f"{'the weights of its directory' if version is None else f'weights of version {version}'}; "
            f"{count} unfinished completions were asked for again"
        )
        self.events.append(event)
        logger.warning("%s; it was: %s", event, str(death).splitlines()[0])


def _build(start: Callable[[], WorkerGroup], make: Callable[[], EngineHost]) -> WorkerGroup:
    workers = start()
    workers.build([make])
    return workers


def _cost(prompt: Prompt, sampling: SamplingConfig) -> int:
    """Tokens that a prompt may come to."""
    return len(prompt.tokens) + sampling.n * (prompt.max_tokens or sampling.max_tokens)


def _refuse_twins(prompts: Sequence[Prompt]) -> None:
    """Two prompts with one id may go to two replicas, where neither would notice."""
    seen: set[int] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"prompt id {prompt.id} occurs twice in one call; give every drawn prompt an id of its own")
        seen.add(prompt.id)


_conforms: type[RolloutEngine] = RayEngine
_streams: type[SupportsAsyncGenerate] = RayEngine
_is_saved: type[SupportsPartial] = RayEngine
_sleeps: type[SupportsSleep] = RayEngine
