"""Requests of ours as vLLM takes them, and its outputs as ours: the `Stepper` of the vLLM engine."""

from collections.abc import Sequence
from typing import Any

from align_core.errors import WorkerError
from align_core.types import FinishReason
from align_rollout.stream import Delta, Request

_FINISH: dict[str, FinishReason] = {"stop": "stop", "length": "length", "abort": "abort"}


class VllmStepper:
    """Drives the engine inside a vllm.LLM, step by step."""

    def __init__(self, llm: Any, *, eos_ids: Sequence[int]) -> None:
        self._engine: Any = llm.llm_engine
        self._eos_ids = list(eos_ids)

    def add(self, request: Request) -> None:
        """See `Stepper`. Each sample is a request with a seed of its own; prefix caching shares the prompt."""
        prompt = {"type": "token", "prompt_token_ids": request.tokens.tolist()}
        self._engine.add_request(request.key, prompt, self._params(request))

    def step(self) -> list[Delta]:
        """See `Stepper`."""
        return [delta for output in self._engine.step() for delta in [_delta(output)] if delta is not None]

    def abort(self, keys: Sequence[str]) -> None:
        """See `Stepper`."""
        if keys:
            self._engine.abort_request(list(keys))

    def close(self) -> None:
        """Lets go of the engine and so of the model's memory; nothing can be asked after it."""
        self._engine = None

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams  # noqa: PLC0415  (optional dependency)
        from vllm.sampling_params import RequestOutputKind  # noqa: PLC0415

        sampling = request.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=request.max_tokens,
            seed=request.seed if sampling.seeded and sampling.temperature > 0 else None,
            stop_token_ids=sorted({*self._eos_ids, *sampling.stop_tokens}),
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if request.at_once else RequestOutputKind.DELTA,
        )


def _delta(output: Any) -> Delta | None:
    (completion,) = output.outputs
    reason = completion.finish_reason
    if reason is not None and reason not in _FINISH:
        raise WorkerError(f"vLLM ended the request {output.request_id} with {reason!r}")
    tokens = list(completion.token_ids)
    if not tokens and reason is None:
        return None
    flat = completion.logprobs  # of each position the sampled token comes first
    logprobs = [flat.logprobs[start] for start in flat.start_indices] if tokens else []
    return Delta(
        key=output.request_id, tokens=tokens, logprobs=logprobs, finish_reason=_FINISH[reason] if reason else None
    )
