"""The random generators of a rank as a part of its checkpoint: torch's, CUDA's, and megatron-core's own."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from align_core.megatron.parallel import RankContext


def random_state(context: RankContext) -> ShardedObject:
    """This rank's generators, one object a position."""
    parallel = context.parallel
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if context.device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape = (parallel.pipeline, parallel.tensor, parallel.context, parallel.data)
    place = (context.pipeline, context.tensor, context.context, context.data)
    return ShardedObject("rng", states, shape, place)


def restore_random_state(states: Mapping[str, Any]) -> None:
    """Set this rank's generators to what `random_state` held."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
