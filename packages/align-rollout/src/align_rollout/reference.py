"""An engine on Hugging Face transformers: slow, exact and simple. For tests, and for machines without vLLM.

Each request has a cache of its own and is advanced one token at a time, so that nothing depends on its neighbours.
Shape letters: V vocabulary.
"""

from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import (
    RolloutEngine,
    SupportsAsyncGenerate,
    SupportsCheck,
    SupportsPartial,
    SupportsTokenStream,
    WeightSink,
)
from align_core.errors import ConfigError, MissingDependencyError, SyncError
from align_core.text import load_tokenizer
from align_core.types import ParamMeta, Prompt, WeightChunk
from align_rollout.checkpoint import ModelFacts, read_model
from align_rollout.names import as_parameters, checkpoint_metas
from align_rollout.receiver import as_tensor
from align_rollout.sampling import check_prompts
from align_rollout.stream import Delta, Request, Stream, Streamed
from align_rollout.update import PendingUpdate, check_version

if TYPE_CHECKING:
    import torch


class TransformersEngine(Streamed):
    """A `RolloutEngine` on a transformers model."""

    def __init__(self, model: Any, path: Path, config: EngineConfig, *, loaded: bool) -> None:
        """An engine on a loaded `model`; if not `loaded`, its weights are still to come."""
        facts = read_model(path)
        self._config, self._vocab_size = config, facts.vocab_size
        self._closed = False
        self._stepper = _Stepper(model, frozenset(facts.eos_ids), most=config.max_sequences)
        self._stream = Stream(
            self._stepper,
            check=self._check,
            version=lambda: self._sink.version,
            decode=lambda: load_tokenizer(path).decode,
        )
        self._sink = _Sink(model, self._stepper, self._stream, config, loaded=loaded)

    @classmethod
    def check(cls, model: Path, config: EngineConfig) -> None:
        """Raises what `from_model` raises, as far as the model's files and the settings tell; needs no transformers."""
        _checked(model, config)

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "TransformersEngine":
        """Loads the directory `model`; without *.safetensors in it the engine waits for its first weights.

        Raises:
            CheckpointError: `model` is no model directory.
            ConfigError: tensor parallelism, which this engine does not do, or a device that is not there.
            MissingDependencyError: transformers is not installed.
        """
        try:
            import torch  # noqa: PLC0415  (optional dependency)
            from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415
        except ImportError as error:
            raise MissingDependencyError(
                "the engine 'transformers' needs torch and transformers; run: pip install torch transformers"
            ) from error
        facts = _checked(model, config)
        device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.device is 'cuda', but torch finds no CUDA device; use 'cpu' or 'auto'")
        dtype = getattr(torch, config.dtype)
        if facts.has_weights:
            made = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
        else:
            made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model), dtype=dtype)
        return cls(made.to(device).eval(), model, config, loaded=facts.has_weights)

    def weight_sink(self) -> WeightSink:
        """The one sink of this engine."""
        return self._sink

    def close(self) -> None:
        """Lets go of the model; calling it again does nothing."""
        self._closed = True
        self._stream.close()
        self._stepper.model = None

    def _check(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        if self._closed:
            raise SyncError("the engine cannot be used: it is closed; start another")
        self._sink.check_answerable()
        check_prompts(prompts, sampling, context=self._config.context, vocab_size=self._vocab_size)


class _Stepper:
    """One token a step for the first `most` requests."""

    def __init__(self, model: Any, eos_ids: Collection[int], *, most: int) -> None:
        self.model = model
        self._eos_ids, self._most = eos_ids, most
        self._running: dict[str, _Sequence] = {}

    def add(self, request: Request) -> None:
        self._running[request.key] = _Sequence(request, {*self._eos_ids, *request.sampling.stop_tokens})

    def step(self) -> list[Delta]:
        import torch  # noqa: PLC0415

        with torch.no_grad():
            deltas = [sequence.step(self.model) for sequence in list(self._running.values())[: self._most]]
        self.abort([delta.key for delta in deltas if delta.finish_reason])
        return deltas

    def abort(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._running.pop(key, None)

    def forget_caches(self) -> None:
        """Keys and values of old weights; they are computed again from the tokens."""
        for sequence in self._running.values():
            sequence.forget_cache()


class _Sequence:
    """One request: its tokens so far and their keys and values."""

    def __init__(self, request: Request, eos_ids: Collection[int]) -> None:
        import torch  # noqa: PLC0415

        self._request, self._eos_ids = request, eos_ids
        self._tokens: list[int] = request.tokens.tolist()
        self._sampled = 0
        self._generator = torch.Generator().manual_seed(request.seed)
        self.forget_cache()

    def forget_cache(self) -> None:
        self._cache: Any = None
        self._cached = 0

    def step(self, model: Any) -> Delta:
        import torch  # noqa: PLC0415

        ids = torch.tensor([self._tokens[self._cached :]], device=model.device)
        output = model(ids, past_key_values=self._cache, use_cache=True)
        self._cache, self._cached = output.past_key_values, len(self._tokens)
        logits_V = output.logits[0, -1].float().cpu()
        token = _draw(logits_V, self._request.sampling, self._generator)
        self._tokens.append(token)
        self._sampled += 1
        full = self._sampled == self._request.max_tokens
        return Delta(
            key=self._request.key,
            tokens=[token],
            logprobs=[float(logits_V.log_softmax(-1)[token])],
            finish_reason="stop" if token in self._eos_ids else "length" if full else None,
        )


class _Sink:
    """Loads new weights into the model in place."""

    def __init__(self, model: Any, stepper: _Stepper, stream: Stream, config: EngineConfig, *, loaded: bool) -> None:
        self.version = 0 if loaded else -1
        self._model = model
        self._expected = checkpoint_metas(model)
        self._stepper, self._release = stepper, stream.release
        self._hold = partial(stream.hold, config.in_flight)
        self._pending: PendingUpdate | None = None
        self._staged: dict[str, torch.Tensor] = {}

    def begin(self, metadata: Sequence[ParamMeta], version: int) -> None:
        self._pending, self._staged = None, {}
        check_version(version=version, current=self.version)
        self._pending = PendingUpdate(expected=self._expected, announced=metadata, version=version)

    def load(self, chunk: WeightChunk) -> None:
        pending = self._announced()
        pending.check(chunk)
        self._staged.update({weight.meta.name: as_tensor(weight) for weight in chunk})
        pending.record(chunk)

    def commit(self) -> None:
        import torch  # noqa: PLC0415

        pending = self._announced()
        pending.check_complete()
        values = as_parameters(self._model, self._staged)
        self._hold()
        with torch.no_grad():
            for name, weight in self._model.named_parameters():
                weight.copy_(values[name])
        self._stepper.forget_caches()
        self._pending, self._staged, self.version = None, {}, pending.version
        self._release()

    def check_answerable(self) -> None:
        if self.version < 0:
            raise SyncError("the engine was started on a directory without *.safetensors and has got no weights yet")

    def _announced(self) -> PendingUpdate:
        if self._pending is None:
            raise SyncError("no weight update is under way; call begin first")
        return self._pending


def _draw(logits_V: "torch.Tensor", sampling: SamplingConfig, generator: "torch.Generator") -> int:
    import torch  # noqa: PLC0415

    if sampling.temperature == 0:
        return int(logits_V.argmax())
    p_V = (logits_V / sampling.temperature).softmax(-1)
    sorted_V, order_V = p_V.sort(descending=True, stable=True)
    kept = int((sorted_V.cumsum(-1) < sampling.top_p).sum()) + 1
    return int(order_V[torch.multinomial(sorted_V[:kept], 1, generator=generator)])


def _checked(model: Path, config: EngineConfig) -> ModelFacts:
    if config.tensor > 1:
        raise ConfigError(f"the engine 'transformers' runs on one device; engine.tensor is {config.tensor}, use 1")
    return read_model(model)


_conforms: type[RolloutEngine] = TransformersEngine
_checks: SupportsCheck = TransformersEngine
_streams: type[SupportsAsyncGenerate] = TransformersEngine
_is_saved: type[SupportsPartial] = TransformersEngine
_takes: type[WeightSink] = _Sink
_follows: type[SupportsTokenStream] = TransformersEngine
