"""An engine's requests, each waited for by the thread that brought it; and its weight updates. No HTTP here."""

import dataclasses
import queue
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import RolloutEngine, SupportsAsyncGenerate, SupportsTokenStream
from align_core.errors import AlignError, DataError, SyncError
from align_core.text import Tokenizer, render_prompt
from align_core.types import Completion, ParamMeta, Piece, Prompt, WeightTensor, shared_memory
from align_rollout.forms import Answer, GrowingText, contents_of, limit_of, sampling_of

Gone = Callable[[], bool]
"""Whether the client has hung up."""
_POLL_S = 0.5


class Engine(RolloutEngine, SupportsAsyncGenerate, Protocol):
    """What can be served."""


class ClientGoneError(AlignError):
    """Nobody waits for the answer any more."""


class EngineFailedError(AlignError):
    """The engine answers nothing any more."""


class Service:
    """The engine behind a server."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: EngineConfig) -> None:
        self._engine, self._tokenizer, self._config = engine, tokenizer, config
        self._ids = count()
        self._sink_lock = threading.Lock()
        self._news = threading.Condition()
        self._waiting: dict[int, list[Completion]] = {}
        self._streams: dict[int, queue.SimpleQueue[Piece]] = {}
        self._failure: BaseException | None = None
        self._closed = False
        if isinstance(engine, SupportsTokenStream):
            engine.listen(self._hear)
        self._pump = threading.Thread(target=self._deliver, name="align-rollout-serve", daemon=True)
        self._pump.start()

    @property
    def name(self) -> str:
        """Of the model, as clients call it."""
        return self._tokenizer.directory.name

    def check_alive(self) -> None:
        """Raises EngineFailedError once the engine has failed."""
        if self._failure is not None:
            raise EngineFailedError(f"the engine has failed; start the server again ({self._failure!r})")

    def complete(self, body: Mapping[str, Any], *, chat: bool, gone: Gone) -> dict[str, Any]:
        """The answer to a request in OpenAI's form.

        Raises:
            ClientGoneError: nobody waits for it any more; its completions are aborted.
            DataError: the request is not one that can be answered.
            EngineFailedError: none can be.
        """
        sampling, prompts = self._asked(body, chat=chat)
        answer = Answer(model=self.name, chat=chat)
        choices = []
        for place, completions in enumerate(self._generate(prompts, sampling, gone)):
            for completion in completions:
                index = place * sampling.n + completion.sample
                choices.append(answer.choice(completion, self._tokenizer, index=index))
        return answer.whole(choices, asked=sum(len(prompt.tokens) for prompt in prompts))

    def stream(self, body: Mapping[str, Any], *, chat: bool, gone: Gone) -> Generator[dict[str, Any], None, None]:
        """The same as events, each as its tokens come. The request is under way on return; raises as `complete`.

        Whoever stops before the last event closes the iterator, which aborts what is left.
        """
        if not isinstance(self._engine, SupportsTokenStream):
            raise DataError(f"stream: the engine {self._config.name!r} gives whole answers only; leave it out")
        sampling, prompts = self._asked(body, chat=chat)
        heard: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        with self._news:
            self._streams |= {prompt.id: heard for prompt in prompts}
        try:
            self._submit(prompts, sampling)
        except BaseException:
            self._forget(prompts)
            raise
        options = body.get("stream_options") or {}
        usage = bool(options.get("include_usage")) if isinstance(options, dict) else False
        return self._events(Answer(model=self.name, chat=chat), prompts, sampling, heard, gone, usage=usage)

    def update(self, step: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """One step of a weight update: `begin`, `load` or `commit`."""
        sink = self._engine.weight_sink()
        with self._sink_lock:
            if step == "begin":
                sink.begin([_meta(item) for item in body["metadata"]], int(body["version"]))
            elif step == "load":
                sink.load([_weight(item) for item in body["weights"]])
            else:
                sink.commit()
        return {"done": step}

    def close(self) -> None:
        """Stops delivering."""
        with self._news:
            self._closed = True
            self._news.notify_all()
        self._pump.join()

    def _asked(self, body: Mapping[str, Any], *, chat: bool) -> tuple[SamplingConfig, list[Prompt]]:
        self.check_alive()
        sampling, contents = sampling_of(body), contents_of(body, chat=chat)
        open_ended = chat and not limit_of(body)  # an answer may then fill the context, as OpenAI has it
        least = 1 if open_ended else sampling.max_tokens
        seeded = body.get("seed") is not None  # then the same request is answered alike twice
        prompts = [
            self._prompt(content, least, seed_id=place if seeded else None) for place, content in enumerate(contents)
        ]
        if open_ended:
            sampling = dataclasses.replace(sampling, max_tokens=self._config.context - len(prompts[0].tokens))
        return sampling, prompts

    def _prompt(self, content: object, max_tokens: int, *, seed_id: int | None) -> Prompt:
        room = self._config.context - max_tokens
        if room < 1:
            raise DataError(f"max_tokens {max_tokens} leaves no room in a context of {self._config.context}")
        if isinstance(content, list) and content and all(isinstance(item, int) for item in content):
            tokens = np.asarray(content, dtype=np.int32)
        elif isinstance(content, str):
            tokens = np.asarray(self._tokenizer.encode_prompt(content), dtype=np.int32)
        else:
            tokens = render_prompt(self._tokenizer, content, template="auto", max_tokens=room)  # type: ignore[arg-type]
        return Prompt(id=next(self._ids), tokens=tokens, seed_id=seed_id)

    def _submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        self._engine.submit(prompts, sampling)
        with self._news:
            self._news.notify_all()

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig, gone: Gone) -> list[list[Completion]]:
        with self._news:
            self._waiting |= {prompt.id: [] for prompt in prompts}
        try:
            self._submit(prompts, sampling)
            with self._news:
                while not self._news.wait_for(lambda: self._complete(prompts, sampling), timeout=_POLL_S):
                    self._check_going(prompts, gone)
                return [sorted(self._waiting[prompt.id], key=lambda c: c.sample) for prompt in prompts]
        finally:
            self._forget(prompts)

    def _events(
        self,
        answer: Answer,
        prompts: Sequence[Prompt],
        sampling: SamplingConfig,
        heard: "queue.SimpleQueue[Piece]",
        gone: Gone,
        *,
        usage: bool,
    ) -> Generator[dict[str, Any], None, None]:
        first = {prompt.id: place * sampling.n for place, prompt in enumerate(prompts)}
        texts = [GrowingText(self._tokenizer) for _ in range(len(prompts) * sampling.n)]
        left, new = len(texts), 0
        try:
            if answer.chat:
                yield from (answer.opening(index=index) for index in range(left))
            while left:
                try:
                    piece = heard.get(timeout=_POLL_S)
                except queue.Empty:
                    self._check_going(prompts, gone)
                    continue
                index = first[piece.prompt_id] + piece.sample
                text = texts[index].add(piece.tokens, finish_reason=piece.finish_reason)
                left -= piece.finish_reason is not None
                new += len(piece.tokens)
                yield answer.event(piece, text, index=index)
            if usage:
                yield answer.usage_event(asked=sum(len(prompt.tokens) for prompt in prompts), new=new)
        finally:
            if left and self._failure is None:
                self._engine.abort(list(first))
            self._forget(prompts)

    def _check_going(self, prompts: Sequence[Prompt], gone: Gone) -> None:
        """Raises the engine's failure; or aborts and raises if the client has hung up."""
        self.check_alive()
        if self._closed:
            raise SyncError("the server is closing")
        if gone():
            self._engine.abort([prompt.id for prompt in prompts])
            raise ClientGoneError("the client hung up")

    def _complete(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> bool:
        return all(len(self._waiting[prompt.id]) == sampling.n for prompt in prompts)

    def _forget(self, prompts: Sequence[Prompt]) -> None:
        with self._news:
            for prompt in prompts:
                self._waiting.pop(prompt.id, None)
                self._streams.pop(prompt.id, None)

    def _hear(self, piece: Piece) -> None:
        """Called in the engine's thread at every step."""
        heard = self._streams.get(piece.prompt_id)
        if heard is not None:
            heard.put(piece)

    def _deliver(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or self._waiting or self._streams)
                if self._closed:
                    return
            try:
                found = self._engine.poll(_POLL_S)
            except BaseException as failure:
                with self._news:
                    self._failure = failure
                    self._news.notify_all()
                return
            with self._news:
                for completion in found:
                    self._waiting.get(completion.prompt_id, []).append(completion)
                self._news.notify_all()
                if not found:
                    self._news.wait(0.01)  # submitted, and not yet under way; or paused


def _meta(item: Mapping[str, Any]) -> ParamMeta:
    if item["dtype"] not in ("float32", "bfloat16", "float16"):
        raise DataError(f"weight {item['name']!r} has dtype {item['dtype']!r}; use float32, bfloat16 or float16")
    return ParamMeta(name=str(item["name"]), shape=tuple(int(n) for n in item["shape"]), dtype=item["dtype"])


def _weight(item: Mapping[str, Any]) -> WeightTensor:
    file = Path(item["file"])
    if file.parent != shared_memory() or not file.name.startswith("align-weights-"):
        raise DataError(f"weights come in files {shared_memory()}/align-weights-*, not {str(file)!r}")
    return WeightTensor(meta=_meta(item), checksum=int(item["checksum"]), file=file, offset=int(item["offset"]))
