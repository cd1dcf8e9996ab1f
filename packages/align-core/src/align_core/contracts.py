"""The contracts between packages: what an engine, a trainer, a weight source and sink, a reward and a judge must do.

Structural (typing.Protocol): an implementation inherits nothing and is checked by `align_core.conformance`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from align_core.config import EngineConfig, EvaluationConfig, LossConfig, SamplingConfig
from align_core.text import Tokenizer
from align_core.transfer.rectangles import Part, Pulled, Rows
from align_core.transfer.seats import Seat
from align_core.types import (
    Batch,
    ChatReply,
    ChatRequest,
    Completion,
    ParamMeta,
    Piece,
    Prompt,
    Score,
    WeightChunk,
    WeightTensor,
)


class WeightSource(Protocol):
    """The weights of a trainer, in Hugging Face names and shapes, whatever its parallel layout."""

    def metadata(self) -> Sequence[ParamMeta]:
        """Every weight that `iterate` will yield, in that order."""
        ...

    def iterate(self) -> Iterator[WeightTensor]:
        """The weights, one at a time; their bytes stay valid as long as this source lives."""
        ...


class WeightSink(Protocol):
    """Where new weights enter a live engine. The old weights answer requests until `commit` returns."""

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        """Announces all weights of `version`; raises SyncError that names what the engine lacks or does not know."""
        ...

    def load(self, chunk: WeightChunk) -> None:
        """Takes some of the announced weights; raises SyncError that names a weight whose checksum differs."""
        ...

    def commit(self) -> None:
        """Makes `version` current and drops caches of the old one; raises SyncError naming weights that never came."""
        ...


@runtime_checkable
class DirectSource(Protocol):
    """A weight source whose bytes an engine on the same device can read where they are."""

    def layout(self) -> Sequence[Sequence[Part]]:
        """Of each rank of the trainer, which parts of which weights it holds; the same object every time."""
        ...

    def devices(self) -> frozenset[str]:
        """UUIDs of the GPUs that hold the weights."""
        ...

    def memory(self) -> Sequence[Mapping[str, object]]:
        """Of each rank, its tensors by name: as they are to an engine in this process, as handles to another one.

        They hold the weights of now, and keep them until the trainer's next step.
        """
        ...

    def checksums(self, rows: Rows) -> Sequence[Mapping[str, int]]:
        """Of each rank, the checksums of its primary parts of each weight, summed over `rows`."""
        ...


@runtime_checkable
class DirectSink(Protocol):
    """A weight sink that fetches announced weights from a trainer's memory itself, between `begin` and `commit`."""

    def remember(self, source: DirectSource) -> None:
        """Says where the weights to come are from, for whoever has to fetch them a second time."""
        ...

    def devices(self) -> frozenset[str]:
        """UUIDs of the GPUs that every engine behind this sink sees, and so can fetch from."""
        ...

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        """Of each engine behind this sink, of each of its ranks, which parts of which weights it holds."""
        ...

    def pull(
        self, layout: Sequence[Sequence[Part]], memory: Sequence[Mapping[str, object]], rows: Rows | None
    ) -> Sequence[Pulled]:
        """Overwrites the old weights with the new ones; until `commit` the engine refuses to sample.

        Args:
            layout: of `DirectSource`.
            memory: of `DirectSource`.
            rows: which rows to sum afterwards, or none of them.
        Returns:
            One answer an engine.
        """
        ...


@runtime_checkable
class LinkedSource(Protocol):
    """A weight source whose ranks send their parts to the ranks of engines: NCCL between GPUs, gloo on CPU."""

    def devices(self) -> frozenset[str]:
        """See `DirectSource`; empty on CPU."""
        ...

    def seat(self, layouts: Sequence[Sequence[Sequence[Part]]]) -> Seat:
        """A seat for the first rank of the engines with these `layouts`; their others sit behind it, in order.

        The same object as long as `layouts` is the same object: then all are still connected.
        """
        ...

    def send(self, rows: Rows | None) -> Sequence[Mapping[str, int]]:
        """Sends to all who have taken their seats; the checksums over `rows` of each rank's primary parts."""
        ...

    def as_sent(self) -> Iterator[WeightTensor]:
        """The weights as they were last sent, for an engine that starts anew, though they may have changed since."""
        ...


@runtime_checkable
class LinkedSink(Protocol):
    """A weight sink whose engines' ranks receive announced weights over links, between `begin` and `commit`."""

    def remember(self, source: LinkedSource) -> None:
        """Says where the weights to come are from, for whoever needs them a second time."""
        ...

    def devices(self) -> frozenset[str]:
        """UUIDs of the GPUs of all engines behind this sink; empty on CPU."""
        ...

    def layouts(self) -> Sequence[Sequence[Sequence[Part]]]:
        """See `DirectSink`; the same object until an engine has been replaced."""
        ...

    def expect(self, seat: Seat) -> None:
        """Takes seats from `seat` on; from its return to `commit` no request moves, and `receive` waits for none.

        Raises SyncError or LayoutError for weights that the engine cannot take, while no sender waits for it yet.
        """
        ...

    def receive(self, rows: Rows | None) -> Sequence[Pulled]:
        """Overwrites the old weights with what comes, as `DirectSink.pull` does; one answer an engine."""
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Generates token ids from token ids."""

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> list[Completion]:
        """`sampling.n` completions a prompt, in the order of the prompts, samples 0 .. n-1 of a prompt adjacent.

        Raises DataError for a prompt that leaves no room for `sampling.max_tokens` in the context.
        """
        ...

    def weight_sink(self) -> WeightSink:
        """The door for new weights."""
        ...

    def close(self) -> None:
        """Frees processes and memory; calling it again does nothing."""
        ...


@runtime_checkable
class SupportsCheck(Protocol):
    """A class of engines that says beforehand whether it can serve a model with these settings."""

    def check(self, model: Path, config: EngineConfig) -> None:
        """Raises what starting the engine would raise, as far as files and settings tell; touches no device."""
        ...


@runtime_checkable
class SupportsPreload(Protocol):
    """A class of engines whose code takes seconds to import, which a process may do while it waits for its turn."""

    def preload(self, config: EngineConfig) -> None:
        """Imports what starting an engine with these settings will need; takes no memory of a device."""
        ...


@runtime_checkable
class SupportsAsyncGenerate(Protocol):
    """An engine that samples in the background: requests go in, completions come out as each one ends.

    New weights may be committed between any two calls; `EngineConfig.in_flight` says what becomes of what is under way.
    """

    def submit(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        """Queues `sampling.n` completions a prompt and returns at once; an id must not be under way already.

        Raises DataError as `RolloutEngine.generate` does; then nothing is queued.
        """
        ...

    def poll(self, timeout_s: float | None = None) -> list[Completion]:
        """The completions that ended since the last poll, in the order in which they ended, each exactly once.

        Waits until there is one, for `timeout_s` seconds at most (none: without limit, 0: not at all); returns an
        empty list when that time is over, and at once when nothing is under way, or all of it is paused.
        """
        ...

    def abort(self, prompt_ids: Sequence[int] | None = None) -> None:
        """Ends all completions of these prompts, or of all; `poll` returns them with finish reason `abort` and the
        tokens they had. An id that is not under way is passed over: it may just have ended.
        """
        ...

    def pause(self) -> None:
        """Stops sampling and returns when no token is being computed; requests under way keep what they have."""
        ...

    def resume(self) -> None:
        """Goes on from where `pause` stopped, with the weights of now; each token carries the version it came from."""
        ...


@runtime_checkable
class SupportsTokenStream(Protocol):
    """An engine that samples in the background and lets one listener follow token by token."""

    def listen(self, listener: Callable[[Piece], None] | None) -> None:
        """From now on `listener` is called with the new tokens of each submitted request, and at its end.

        In the thread that samples, so it must return at once and call nothing of the engine.
        """
        ...


@runtime_checkable
class SupportsPartial(Protocol):
    """An engine that samples in the background and can be saved in the middle of it."""

    def partial(self) -> list[Completion]:
        """What the completions under way have so far, with finish reason `abort`; they go on undisturbed."""
        ...

    def submit_begun(self, prompts: Sequence[Prompt], sampling: SamplingConfig, begun: Sequence[Completion]) -> None:
        """As `SupportsAsyncGenerate.submit`, but not from the beginning.

        Args:
            begun: completions of these prompts. One with finish reason `abort` keeps its tokens, log-probs and
                versions and is sampled on with the weights of now; any other is whole and is not sampled again.
        """
        ...


@runtime_checkable
class SupportsSleep(Protocol):
    """An engine that gives its device memory back while something else needs it."""

    def sleep(self, *, keep_weights: bool = True) -> None:
        """Frees weights and KV cache; requests under way are ended first, as by `abort`. Asleep it refuses to sample.

        Args:
            keep_weights: keep a copy on the host, which takes time and host memory; without it the engine needs a
                weight update after (or before) `wake`, and refuses to sample until then.
        """
        ...

    def wake(self) -> None:
        """Takes the memory again; the weights are those of before, if they were kept. Awake it does nothing."""
        ...


@runtime_checkable
class Trainer(Protocol):
    """A model that is scored and updated; holds the optimizer, knows nothing of stages."""

    def logprobs(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], log-prob of each token given those before it in its sequence; 0 for the first of a sequence."""
        ...

    def step(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """One optimizer update on the whole batch, however it is cut; returns `loss`, `grad_norm`, `lr` and others."""
        ...

    def weights(self) -> WeightSource:
        """The current weights."""
        ...

    def save(self, path: Path, state: Mapping[str, str]) -> None:
        """Writes all that is needed to continue, atomically: weights, optimizer, schedule, random state and `state`."""
        ...

    def load(self, path: Path) -> Mapping[str, str]:
        """Continues from `save`, on any parallel layout; returns the `state` saved with it."""
        ...


@runtime_checkable
class SupportsScoring(Protocol):
    """A model with a scalar head."""

    def scores(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [B], the scalar at the last token of each sequence."""
        ...


@runtime_checkable
class SupportsValues(Protocol):
    """A model with a scalar head, read at every token: the critic of PPO."""

    def values(self, batch: Batch) -> NDArray[np.float32]:
        """float32 [N], the scalar before each token is chosen; 0 for the first of a sequence."""
        ...


@runtime_checkable
class SupportsEvaluation(Protocol):
    """A trainer that computes a loss without learning from it."""

    def evaluate(self, batch: Batch, loss: LossConfig) -> Mapping[str, float]:
        """`loss` and the loss's own metrics of the whole batch, as `step` returns them; nothing is updated."""
        ...


@runtime_checkable
class SupportsExport(Protocol):
    """A trainer that writes its model alone, without the state of training."""

    def export(self, path: Path) -> None:
        """Writes a Megatron checkpoint directory with config and tokenizer beside it, atomically."""
        ...


@runtime_checkable
class SupportsClose(Protocol):
    """A trainer that owns processes or memory."""

    def close(self) -> None:
        """Frees them; calling it again does nothing."""
        ...


@runtime_checkable
class SupportsAsyncSave(Protocol):
    """A trainer whose `save` may return before everything is on disk."""

    def finish_saving(self) -> None:
        """Returns when what `save` began is complete on disk; raises the error in which it ended."""
        ...


@runtime_checkable
class SupportsOffload(Protocol):
    """A trainer that can leave its GPU to an engine for a while. On CPU both calls do nothing."""

    def offload(self, weights: bool = True) -> None:
        """Moves gradients and optimizer state to the host, and the weights too unless `weights` is False.

        Every other method brings back by itself what it needs.
        """
        ...

    def reload(self) -> None:
        """Brings everything back to the GPU; does nothing when it is there."""
        ...


class RewardFunction(Protocol):
    """Scores completions; one call over lists, so that an implementation may batch or parallelise."""

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[object]]
    ) -> Sequence[Score]:
        """One score a completion.

        Args:
            prompts: of each completion the prompt as text: the user's words as they are, or a conversation of several
                turns as `align_core.text.as_text` writes it (`user: ...`, a blank line, `assistant: ...`).
            completions: the replies, without special tokens.
            columns: the dataset's other columns, repeated for each completion.
        """
        ...


class Judge(Protocol):
    """Answers conversations that ask for a verdict: a model behind a service, or in this process.

    What the entry-point group `align.judges` offers is called with one `JudgeConfig` and gives a judge.
    """

    async def reply(self, request: ChatRequest) -> ChatReply:
        """The next turn. Callers start as many as they have; the judge itself keeps to its limits.

        Retries what is worth it. Raises an AlignError when there is no reply; never gives an error as a reply.
        """
        ...

    async def close(self) -> None:
        """Frees connections; calling it again does nothing."""
        ...


class Evaluation(Protocol):
    """Measures the model inside a live engine; stages find them in the entry-point group `align.evaluations`."""

    def __call__(
        self, engine: RolloutEngine, tokenizer: Tokenizer, config: EvaluationConfig, *, step: int
    ) -> Mapping[str, float]:
        """Metrics by name. Leaves the engine as it was; details go to files below `config.out`, named by `step`."""
        ...


class Command(Protocol):
    """A command mounted under `align` through the entry-point group `align.commands`."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs with the arguments after its name; returns the exit status."""
        ...
