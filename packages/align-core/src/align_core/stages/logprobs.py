"""`align logprobs`: teacher-forced log-probs of each response in a file, under a language model."""

import numpy as np
from numpy.typing import NDArray

from align_core.config import LogprobsConfig
from align_core.stages.responses import Annotation, annotate_responses
from align_core.stages.world import Model, World
from align_core.types import Batch


def run_logprobs(config: LogprobsConfig, world: World) -> None:
    """Adds `logprob` (sum over the response's tokens, its end included, nats) and `num_tokens`; tokens on request."""

    def annotate(model: Model, batch: Batch) -> list[Annotation]:
        logprobs, mask = model.logprobs(batch), batch.mask
        return [
            _annotation(batch.tokens[place][mask[place]], logprobs[place][mask[place]], tokens=config.tokens)
            for place in (slice(a, b) for a, b in zip(batch.offsets[:-1], batch.offsets[1:]))
        ]

    annotate_responses(config, world, head="lm", annotate=annotate)


def _annotation(ids: NDArray[np.int32], logprobs: NDArray[np.float32], *, tokens: bool) -> Annotation:
    found: dict[str, object] = {"logprob": float(logprobs.astype(np.float64).sum()), "num_tokens": len(ids)}
    if tokens:
        found |= {"token_ids": ids.tolist(), "token_logprobs": [float(value) for value in logprobs]}
    return found
