"""Whether two LaTeX answers mean the same, decided by math-verify (the `[math]` extra) in processes of their own.

In processes of their own because its time limit is a signal, which works in a main thread only and lost rewards
silently elsewhere (Math-Verify issues 11, 50, 55): here the parent waits, and kills a worker that is late. Workers are
given memory limits, because an answer such as 9^{9^{9^9}} is one line. Knows nothing of where answers come from.
"""

import contextlib
import importlib.util
import json
import select
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple

from align_core.errors import ConfigError, WorkerError, missing_dependency

_START_SECONDS = 120.0  # importing sympy on a busy machine


class Equivalence(NamedTuple):
    """The verdict on one pair."""

    equal: bool
    note: str = ""
    """Why there is no verdict (then `equal` is False); empty when there is one."""


class EquivalencePool:
    """Compares answers in worker processes; a context manager, so that the processes end."""

    def __init__(self, *, workers: int = 2, seconds: float = 10.0) -> None:
        """`seconds` is the time a comparison may take, after which it counts as not equal, with a note.

        Raises:
            MissingDependencyError: math-verify is not installed.
        """
        if workers < 1 or not seconds > 0:
            raise ConfigError(f"a pool needs workers >= 1 and seconds > 0, got {workers} and {seconds}")
        if importlib.util.find_spec("math_verify") is None:
            raise missing_dependency("math-verify", "align-eval[math]", needed_for="comparing LaTeX answers")
        self._seconds = seconds
        self._workers = [_Worker() for _ in range(workers)]

    def compare(self, pairs: Sequence[tuple[str, str]]) -> list[Equivalence]:
        """One verdict a pair (gold, answer), in their order. The gold comes first: math-verify is not symmetric."""
        free: SimpleQueue[_Worker] = SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def one(pair: tuple[str, str]) -> Equivalence:
            worker = free.get()
            try:
                return worker.compare(*pair, seconds=self._seconds)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(one, pairs))

    def close(self) -> None:
        """Ends the workers; calling it again does nothing."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> "EquivalencePool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Worker:
    """One process, started when first needed and again after it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._end: weakref.finalize[[subprocess.Popen[bytes]], _Worker] | None = None

    def compare(self, gold: str, answer: str, *, seconds: float) -> Equivalence:
        process = self._started()
        request = json.dumps({"gold": gold, "answer": answer}) + "\n"
        assert process.stdin is not None
        try:
            process.stdin.write(request.encode())
            process.stdin.flush()
            reply = self._line(seconds)
        except BrokenPipeError:
            reply = b""
        if reply is None:
            self.stop()
            return Equivalence(False, f"the comparison took more than {seconds:g} s")
        if not reply:
            self.stop()
            return Equivalence(False, "the comparison ended its process (memory limit?)")
        return Equivalence(bool(json.loads(reply)["equal"]), str(json.loads(reply)["note"]))

    def stop(self) -> None:
        self._process = None
        if self._end is not None:
            self._end()

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            command = [sys.executable, "-m", "align_eval.accuracy.equivalence_worker"]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            self._end = weakref.finalize(self, _kill, self._process)  # a reward function is dropped, never closed
            if self._line(_START_SECONDS) != b"ready\n":
                self.stop()
                raise WorkerError(f"the worker that compares answers does not start; try: {' '.join(command)}")
        return self._process

    def _line(self, seconds: float) -> bytes | None:
        """A line of the worker's; empty when it has ended, None when it is late. A line comes in one write."""
        assert self._process is not None and self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        return self._process.stdout.readline() if ready else None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
