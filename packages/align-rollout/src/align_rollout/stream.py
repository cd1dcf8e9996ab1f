"""Requests on their way through an engine: what every engine does alike, asked for one batch or in the background.

An engine brings a `Stepper`, which samples the next tokens of all its requests; everything else is here: seeds, limits,
stop texts, versions of tokens, completions in the order in which they end, aborting, pausing, and what becomes of
requests while weights change. Knows neither torch nor vLLM.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from align_core.config import InFlight, SamplingConfig
from align_core.errors import ConfigError, DataError, SyncError
from align_core.types import Completion, FinishReason, Piece, Prompt
from align_rollout.sampling import completion_seed
from align_rollout.stopping import StopTexts


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to sample."""

    key: str
    """Unique among those under way."""
    prompt: Prompt
    sample: int
    sampling: SamplingConfig
    max_tokens: int
    """Most tokens still to sample."""
    seed: int
    at_once: bool
    """Nobody looks at it before it has ended, so its tokens may come all together."""
    begun: Completion | None = None
    """What it has already, from an engine of before."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """int32 [L], the prompt and what was sampled before."""
        return self.prompt.tokens if self.begun is None else np.concatenate([self.prompt.tokens, self.begun.tokens])


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """The next tokens of a request."""

    key: str
    tokens: Sequence[int]
    logprobs: Sequence[float]
    finish_reason: FinishReason | None


class Stepper(Protocol):
    """The part of an engine that samples."""

    def add(self, request: Request) -> None:
        """Takes a request in."""
        ...

    def step(self) -> list[Delta]:
        """Samples at least one further token of the requests it can, unless that takes more steps; [] if so."""
        ...

    def abort(self, keys: Sequence[str]) -> None:
        """Forgets these requests."""
        ...


@dataclass(kw_only=True, slots=True)
class _State:
    """What a request has so far."""

    request: Request
    stop: StopTexts | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, request: Request, stop: StopTexts | None) -> "_State":
        """With what the request has already."""
        state = cls(request=request, stop=stop)
        if request.begun is not None:
            state.tokens = request.begun.tokens.tolist()
            state.logprobs = request.begun.logprobs.tolist()
            state.versions = request.begun.token_versions.tolist()
        return state

    def extend(self, delta: Delta, version: int) -> FinishReason | None:
        """Takes the next tokens; returns why the completion ends with them, if it does."""
        self.tokens.extend(delta.tokens)
        self.logprobs.extend(delta.logprobs)
        self.versions.extend([version] * len(delta.tokens))
        length = self.stop.end(self.tokens, new=len(delta.tokens)) if self.stop else None
        if length is None:
            return delta.finish_reason
        del self.tokens[length:], self.logprobs[length:], self.versions[length:]
        return "stop"

    def completion(self, reason: FinishReason, version: int) -> Completion:
        """The completion, ended by `reason`; `version` is that of one without tokens."""
        mixed = len(set(self.versions)) > 1
        return Completion(
            prompt_id=self.request.prompt.id,
            sample=self.request.sample,
            tokens=np.asarray(self.tokens, dtype=np.int32),
            logprobs=np.asarray(self.logprobs, dtype=np.float32),
            finish_reason=reason,
            version=self.versions[0] if self.versions else version,
            versions=np.asarray(self.versions, dtype=np.int32) if mixed else None,
        )


class Stream:
    """The requests of one engine. Any thread may call any method; one at a time works on the engine."""

    def __init__(
        self,
        stepper: Stepper,
        *,
        check: Callable[[Sequence[Prompt], SamplingConfig], None],
        version: Callable[[], int],
        decode: Callable[[], Callable[[Sequence[int]], str]],
    ) -> None:
        """A stream without requests.

        Args:
            check: raises if the engine cannot sample now, or not these prompts.
            version: of the weights that sample now.
            decode: makes the function from token ids to text; called when a stop text is first asked for.
        """
        self._stepper, self._check, self._version, self._make_decode = stepper, check, version, decode
        self._decode: Callable[[Sequence[int]], str] | None = None
        self._running: dict[str, _State] = {}
        self._gate, self._lock = threading.Lock(), threading.RLock()
        self._news = threading.Condition()
        self._ended: deque[Completion] = deque()
        self._paused = self._closed = False
        self._holder: int | None = None
        """The thread that is changing weights."""
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._listener: Callable[[Piece], None] | None = None

    def listen(self, listener: Callable[[Piece], None] | None) -> None:
        """See `align_core.contracts.SupportsTokenStream`."""
        self._listener = listener

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """See `align_core.contracts.RolloutEngine`; requests in the background move on meanwhile."""
        with self._settled():
            if self._paused:
                raise SyncError("the engine is paused; call resume() before it generates")
            requests = self._requests(prompts, sampling, at_once=not sampling.stop)
            wanted = {request.key for request in requests}
            found: dict[str, Completion] = {}
            try:
                self._add(requests, sampling)
                while len(found) < len(wanted):
                    found |= self._step(wanted)
            except BaseException:
                self._forget([key for key in wanted if key in self._running])
                raise
            return [found[request.key] for request in requests]

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self.submit_begun(prompts, sampling, [])

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        """See `align_core.contracts.SupportsPartial`."""
        with self._settled():
            self._add(self._requests(prompts, sampling, at_once=False, begun=begun), sampling)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="align-rollout", daemon=True)
            self._thread.start()
        self._wake()

    def partial(self) -> list[Completion]:
        """See `align_core.contracts.SupportsPartial`."""
        with self._entered():
            return [state.completion("abort", self._version()) for state in self._running.values()]

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with self._news:
            while not self._ended and self._moving():
                left = None if deadline is None else deadline - time.monotonic()
                if (left is not None and left <= 0) or not self._news.wait(left):
                    break
            self._raise_failure()
            found = list(self._ended)
            self._ended.clear()
            return found

    def abort(self, prompt_ids: Sequence[int] | None = None) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        with self._entered():
            chosen = None if prompt_ids is None else set(prompt_ids)
            states = [s for s in self._running.values() if chosen is None or s.request.prompt.id in chosen]
            for state in states:
                self._tell(state, start=len(state.tokens), reason="abort")
            self._deliver([state.completion("abort", self._version()) for state in states])
            self._forget([state.request.key for state in states])
            self._wake()

    def pause(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        with self._entered():
            self._paused = True
        self._wake()

    def resume(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._paused = False
        self._wake()

    def hold(self, policy: InFlight) -> None:
        """Before weights change: does with the requests under way what `policy` says; none moves until `release`.

        New ones wait until then, unless this same thread brings them.

        Requests that are paused are kept whatever the policy: pausing says that they are to be continued.
        """
        with self._entered():
            if policy == "abort" and not self._paused:
                self.abort()
            while policy == "drain" and self._running and not self._paused:
                self._step()
            self._holder = threading.get_ident()

    def release(self) -> None:
        """After weights have changed."""
        self._holder = None
        self._wake()

    def fail(self, failure: BaseException) -> None:
        """No request moves any more; whoever waits, and whoever calls from now on, gets `failure`."""
        self._failure = failure
        self.release()

    def close(self) -> None:
        """Ends the thread; what is under way is forgotten."""
        with self._locked():
            self._closed = True
            self._running.clear()
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Who waits here comes before the thread's next step, which waits at the gate."""
        with self._gate if not self._is_mine() else contextlib.nullcontext():
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _entered(self) -> Iterator[None]:
        """Works on the engine; raises its failure."""
        with self._locked():
            self._raise_failure()
            yield

    @contextlib.contextmanager
    def _settled(self) -> Iterator[None]:
        """Works on the engine while no other thread changes its weights."""
        while True:
            with self._news:
                self._news.wait_for(lambda: not self._is_changed_elsewhere())
            with self._entered():
                if not self._is_changed_elsewhere():  # a change may have begun in between
                    yield
                    return

    def _is_changed_elsewhere(self) -> bool:
        return self._holder not in (None, threading.get_ident()) and not self._closed

    def _is_mine(self) -> bool:
        return self._lock._is_owned()  # type: ignore[attr-defined, no-any-return]

    def _work(self) -> None:
        """The thread: steps while there is something to move."""
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._moving())
            with self._gate:
                pass
            with self._lock:
                if self._closed:
                    return
                if not self._moving():
                    continue
                try:
                    self._step()
                except BaseException as failure:
                    self._failure = failure
                    self._wake()
                    return

    def _moving(self) -> bool:
        return bool(self._running) and not (self._paused or self._holder or self._failure or self._closed)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _wake(self) -> None:
        with self._news:
            self._news.notify_all()

    def _deliver(self, completions: Sequence[Completion]) -> None:
        if completions:
            with self._news:
                self._ended.extend(completions)
                self._news.notify_all()

    def _requests(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        *,
        at_once: bool,
        begun: Sequence[Completion] = (),
    ) -> list[Request]:
        self._check(prompts, sampling)
        under_way = {state.request.prompt.id for state in self._running.values()}
        for prompt in prompts:
            if prompt.id in under_way:
                raise DataError(f"prompt id {prompt.id} is under way already; give every drawn prompt an id of its own")
        had = {(completion.prompt_id, completion.sample): completion for completion in begun}
        return [
            _request(prompt, sample, sampling, at_once=at_once, begun=had.get((prompt.id, sample)))
            for prompt in prompts
            for sample in range(sampling.n)
            if (prompt.id, sample) not in had or had[prompt.id, sample].finish_reason == "abort"
        ]

    def _add(self, requests: Sequence[Request], sampling: SamplingConfig) -> None:
        stop = self._stop_texts(sampling)
        for request in requests:
            self._stepper.add(request)
            self._running[request.key] = _State.of(request, stop)

    def _stop_texts(self, sampling: SamplingConfig) -> StopTexts | None:
        if not sampling.stop:
            return None
        if self._decode is None:
            self._decode = self._make_decode()
        return StopTexts(sampling.stop, self._decode)

    def _step(self, wanted: Collection[str] = ()) -> dict[str, Completion]:
        """One step of the engine; what ended of the `wanted` keys, while all else that ended is delivered.

        Under way until it is delivered: who polls in between would hear that nothing is, and miss it.
        """
        ended: dict[str, Completion] = {}
        stopped: list[str] = []
        for delta in self._stepper.step():
            state = self._running.get(delta.key)
            if state is None or delta.key in ended:
                continue
            start = len(state.tokens)
            reason = state.extend(delta, self._version())
            self._tell(state, start=start, reason=reason)
            if reason is not None:
                ended[delta.key] = state.completion(reason, self._version())
                if delta.finish_reason is None:
                    stopped.append(delta.key)
        if stopped:
            self._stepper.abort(stopped)
        self._deliver([completion for key, completion in ended.items() if key not in wanted])
        for key in ended:
            del self._running[key]
        if ended:
            self._wake()  # who waits for something under way may wait for nothing now
        return {key: completion for key, completion in ended.items() if key in wanted}

    def _tell(self, state: _State, *, start: int, reason: FinishReason | None) -> None:
        """The listener hears of the tokens from `start` on."""
        if self._listener is None or state.request.at_once:
            return
        piece = Piece(
            prompt_id=state.request.prompt.id,
            sample=state.request.sample,
            tokens=tuple(state.tokens[start:]),
            logprobs=tuple(state.logprobs[start:]),
            version=self._version(),
            finish_reason=reason,
        )
        self._listener(piece)

    def _forget(self, keys: Sequence[str]) -> None:
        self._stepper.abort(keys)
        for key in keys:
            del self._running[key]


def _request(
    prompt: Prompt, sample: int, sampling: SamplingConfig, *, at_once: bool, begun: Completion | None
) -> Request:
    length = 0 if begun is None else len(begun.tokens)
    return Request(
        key=f"{prompt.id}/{sample}",
        prompt=prompt,
        sample=sample,
        sampling=sampling,
        max_tokens=(prompt.max_tokens or sampling.max_tokens) - length,
        seed=completion_seed(seed=sampling.seed, prompt_id=_seed_id(prompt), sample=sample, begun=length),
        at_once=at_once,
        begun=begun if length else None,
    )


def _seed_id(prompt: Prompt) -> int:
    return prompt.id if prompt.seed_id is None else prompt.seed_id


def no_decoder() -> Callable[[Sequence[int]], str]:
    """For engines that have no tokenizer; raises ConfigError."""
    raise ConfigError("stop texts need a tokenizer, which this engine does not have; use stop_tokens")


class Streamed:
    """The part of an engine that hands requests to its `Stream`; the engine makes it as `self._stream`."""

    _stream: Stream

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """See `align_core.contracts.RolloutEngine`."""
        return self._stream.generate(prompts, sampling)

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._stream.submit(prompts, sampling)

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        """See `align_core.contracts.SupportsPartial`."""
        self._stream.submit_begun(prompts, sampling, begun)

    def partial(self) -> list[Completion]:
        """See `align_core.contracts.SupportsPartial`."""
        return self._stream.partial()

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        return self._stream.poll(timeout_s)

    def abort(self, prompt_ids: Sequence[int] | None = None) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._stream.abort(prompt_ids)

    def pause(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._stream.pause()

    def resume(self) -> None:
        """See `align_core.contracts.SupportsAsyncGenerate`."""
        self._stream.resume()

    def listen(self, listener: Callable[[Piece], None] | None) -> None:
        """See `align_core.contracts.SupportsTokenStream`."""
        self._stream.listen(listener)
