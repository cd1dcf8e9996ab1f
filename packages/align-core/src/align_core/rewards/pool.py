"""Reward functions in processes of their own, with a time limit: what hangs or dies is ended, started again, and named.

Completions go out in chunks. A chunk that fails as a whole is asked again one completion at a time, so that one bad
completion costs itself, not its neighbours. A completion without a score carries the reason; it never becomes a 0.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from align_core.config import ScoringConfig
from align_core.errors import ConfigError, WorkerError
from align_core.rewards.sources import longest_call
from align_core.types import Score

_START_SECONDS = 120.0  # importing a user's packages may take long on a busy machine
_GIVE_UP = 8  # completions of one step that may hit the limit before the reward counts as out of order ...
_GIVE_UP_SHARE = 0.5  # ... and where failures are dropped, it must also be more than this share of those asked about
_SHOWN = 2000  # characters of a dead process's error output
_READ = 1 << 16


class ProcessFailure(Exception):
    """The process did not answer: `reason` says why."""

    def __init__(self, reason: str, *, timed_out: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.timed_out = reason, timed_out


class RewardProcess:
    """One process that runs the reward `name`; started at the first call, and again after it had to be ended."""

    def __init__(self, name: str, scoring: ScoringConfig) -> None:
        self._name, self._scoring = name, scoring
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self._killed = False

    def start(self) -> None:
        """Raises ConfigError with the function's own complaint when it cannot be loaded."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115, lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "align_core.rewards.worker", self._name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # its children end with it
        )
        self._rest = b""
        if self._killed:  # while this one began, too late for `kill` to see it
            self.kill()
        try:
            answer = self._exchange(dataclasses.asdict(self._scoring), _START_SECONDS)
        except ProcessFailure as failure:
            raise ConfigError(f"reward {self._name!r} cannot be started: {failure.reason}") from failure
        if "error" in answer:
            self.stop()
            raise ConfigError(str(answer["error"]))

    def ask(self, call: Mapping[str, Any]) -> list[Score]:
        """The scores of one call; raises ProcessFailure where there are none."""
        if self._killed:
            raise ProcessFailure("the run has ended")
        if self._process is None:
            self.start()
        answer = self._exchange(call, longest_call(self._name, self._scoring, count=len(call["completions"])))
        if "failure" in answer:
            raise ProcessFailure(str(answer["failure"]), timed_out=bool(answer["timed_out"]))
        return [Score(**score) for score in answer["scores"]]

    def kill(self) -> None:
        """Ends the process for good. From any thread: a call under way in another one fails at once."""
        self._killed = True
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Ends the process and its children; calling it again does nothing."""
        if self._process is None:
            return
        process, self._process = self._process, None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self._errors.close()

    def _exchange(self, message: Mapping[str, object], seconds: float) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        deadline = time.monotonic() + seconds
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process.stdout.fileno(), deadline)
        except (BrokenPipeError, EOFError):
            raise ProcessFailure(self._last_words()) from None
        except TimeoutError:
            self.stop()
            raise ProcessFailure(f"no score within {seconds:g} s", timed_out=True) from None
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, pipe: int, deadline: float) -> bytes:
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                part = os.read(pipe, _READ)
                if not part:
                    raise EOFError
                self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last_words(self) -> str:
        assert self._process is not None
        status = self._process.wait()
        self._errors.seek(0)
        words = self._errors.read().decode(errors="replace")[-_SHOWN:].strip()
        self.stop()
        return f"the reward's process ended with status {status}: {words or 'it said nothing'}"


class RewardPool:
    """`scoring.workers` processes of one reward."""

    def __init__(self, name: str, scoring: ScoringConfig) -> None:
        """Starts the first process, so that a reward that does not load is found before anything else starts."""
        self._name, self._scoring = name, scoring
        self._processes = [RewardProcess(name, scoring) for _ in range(scoring.workers)]
        self._processes[0].start()
        self._free: queue.SimpleQueue[RewardProcess] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(scoring.workers, thread_name_prefix=f"reward-{name[:20]}")
        self._calls = itertools.count()
        self._counting = threading.Lock()
        self._asked = 0
        self._late: set[tuple[int, int]] = set()
        """Completions of this step that hit the time limit, by call and row."""

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[object]],
        *,
        same_step: bool = False,
    ) -> list[Score]:
        """One score or reason a completion. May be called from several threads.

        Args:
            same_step: these completions are of the same step as those of the call before.
        Raises:
            WorkerError: too many completions hit the time limit, so the function itself must be at fault.
        """
        with self._counting:
            if not same_step:
                self._asked, self._late = 0, set()
            self._asked += len(completions)
        call = next(self._calls)
        ending: list[str] = []  # why the run ends, once it does

        def chunk(first: int) -> list[Score]:
            rows = range(first, min(first + self._scoring.chunk, len(completions)))
            if ending:
                return [Score(value=None, error=f"not asked after another had failed: {ending[0]}")] * len(rows)
            scores = self._score_rows(call, rows, prompts, completions, columns)
            if self._scoring.on_failure == "stop":
                ending.extend(score.error for score in scores if score.value is None)
            return scores

        parts = self._threads.map(chunk, range(0, len(completions), self._scoring.chunk))
        return [score for part in parts for score in part]

    def close(self) -> None:
        """Ends the processes, and with them the calls under way; who waits for the others hears CancelledError."""
        self._threads.shutdown(wait=False, cancel_futures=True)  # first: a call that ends makes room for another
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.stop()

    def _score_rows(
        self,
        call: int,
        rows: Sequence[int],
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[object]],
    ) -> list[Score]:
        def ask(some: Sequence[int]) -> list[Score]:
            question = {
                "prompts": [prompts[i] for i in some],
                "completions": [completions[i] for i in some],
                "columns": {name: [values[i] for i in some] for name, values in columns.items()},
            }
            return process.ask(question)

        def together(some: Sequence[int]) -> list[Score]:
            if len(some) > 1:
                with contextlib.suppress(ProcessFailure):
                    return ask(some)
            return [self._alone(ask, call, i) for i in some]

        process = self._free.get()
        try:
            scores = dict(zip(rows, together(rows), strict=True))
            for _ in range(self._scoring.retries):
                failed = [i for i, score in scores.items() if score.value is None]
                scores.update(zip(failed, together(failed), strict=True))
            return list(scores.values())
        finally:
            self._free.put(process)

    def _alone(self, ask: Callable[[Sequence[int]], list[Score]], call: int, row: int) -> Score:
        try:
            (score,) = ask([row])
        except ProcessFailure as failure:
            if failure.timed_out:
                self._late.add((call, row))
            share = _GIVE_UP_SHARE if self._scoring.on_failure == "drop" else 0.0
            if len(self._late) > max(_GIVE_UP, share * self._asked):
                raise WorkerError(
                    f"reward {self._name!r} gave no score within {self._scoring.timeout:g} s for {len(self._late)} "
                    f"of {self._asked} completions of one step; look at the function, or raise scoring.timeout"
                ) from failure
            return Score(value=None, error=failure.reason)
        return score
