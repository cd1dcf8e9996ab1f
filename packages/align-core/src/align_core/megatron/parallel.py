"""One process becomes one rank: torch.distributed, megatron-core's parallel groups, device and seeds.

A single process needs no launcher and no port. Several models of one process share its groups, so `init_rank` may be
called again with the same sizes; the groups go when the last user has called `close_rank`. Knows nothing about models.
"""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch.distributed import HashStore, Store  # type: ignore[attr-defined]

from align_core.config import Device, ParallelConfig
from align_core.errors import ConfigError, LayoutError
from align_core.megatron import cpu


@dataclass(frozen=True, kw_only=True, slots=True)
class RankContext:
    """Where this process stands among the ranks of one trainer."""

    rank: int
    parallel: ParallelConfig
    device: torch.device
    tensor: int
    """Rank within the tensor-parallel group."""
    pipeline: int
    """Pipeline stage."""
    data: int
    """Which copy of the model."""
    context: int = 0
    """Which share of a micro-batch's tokens."""
    expert: int = 0
    """Which share of the experts."""

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head."""
        return self.pipeline == self.parallel.pipeline - 1

    @property
    def speaks(self) -> bool:
        """Whether this rank, of those that hold its copy's results, gives them to all others."""
        return self.is_last_stage and self.tensor == 0 and self.context == 0

    @property
    def is_first_copy(self) -> bool:
        """Whether this rank is the one, of those that hold the same experts (all, in a dense model), that writes."""
        return (self.data * self.parallel.context + self.context) // self.parallel.expert == 0


@dataclass
class _Shared:
    """The process groups of this process; torch.distributed and megatron-core keep theirs in module globals too."""

    context: RankContext | None = None
    users: int = 0
    owns_world: bool = False
    """Whether torch.distributed was started here, and so is to be ended here."""


_SHARED = _Shared()


def init_rank(
    *,
    parallel: ParallelConfig,
    rank: int = 0,
    rendezvous: str | Store | None = None,
    device: Device = "auto",
    local_device: int = 0,
    seed: int = 0,
    timeout_s: float = 1800.0,
) -> RankContext:
    """Make this process rank `rank` of `parallel.world_size`, and wait for the others.

    Args:
        rendezvous: where the ranks meet: `tcp://HOST:PORT`, `file:///PATH`, or a torch store; none for a single rank.
        local_device: index of this rank's GPU among those that the process sees.
        seed: of torch's generators and megatron-core's; nothing in a Llama without dropout draws from them.
        timeout_s: longest wait for another rank in a collective call, seconds.

    Raises:
        LayoutError: `rank` is outside the world, or this process already is a rank of another layout.
        ConfigError: several ranks without a rendezvous, or CUDA asked for where there is none.
    """
    world = parallel.world_size
    if not 0 <= rank < world:
        raise LayoutError(f"rank {rank} is outside a world of {world}; use 0 to {world - 1}")
    where = _choose_device(device, local_device)
    if _SHARED.context is not None:
        return _join(_SHARED.context, rank=rank, parallel=parallel, device=where)
    if rendezvous is None and world > 1:
        raise ConfigError(f"{world} ranks need a rendezvous, for example 'tcp://HOST:PORT'")
    _prepare(where)
    _SHARED.owns_world = _connect(where, rank=rank, world=world, rendezvous=rendezvous, timeout_s=timeout_s)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    _SHARED.users = 1
    _SHARED.context = RankContext(
        rank=rank,
        parallel=parallel,
        device=where,
        tensor=parallel_state.get_tensor_model_parallel_rank(),
        pipeline=parallel_state.get_pipeline_model_parallel_rank(),
        data=parallel_state.get_data_parallel_rank(),
        context=parallel_state.get_context_parallel_rank(),
        expert=parallel_state.get_expert_model_parallel_rank(),
    )
    return _SHARED.context


def close_rank() -> None:
    """Undo one `init_rank`; the last one destroys the process groups. Without groups it does nothing."""
    if _SHARED.context is None:
        return
    _SHARED.users -= 1
    if _SHARED.users == 0:
        _SHARED.context = None
        parallel_state.destroy_model_parallel()
        # An engine in this process may have ended torch.distributed as a whole when it was closed.
        if _SHARED.owns_world and dist.is_initialized():
            dist.destroy_process_group()


def _prepare(device: torch.device) -> None:
    """Bind megatron-core to the device, before anything is on it."""
    if device.type == "cpu":
        cpu.install()
        torch.set_num_threads(1)  # ranks share the cores; gloo and the autograd engine have threads of their own
        return
    # With one queue, gradients leave for the other tensor-parallel ranks while the next product is computed; it is
    # read when CUDA starts in this process.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    torch.cuda.set_device(device)


def _connect(device: torch.device, *, rank: int, world: int, rendezvous: str | Store | None, timeout_s: float) -> bool:
    """Start torch.distributed, or use the one that something else, such as an engine, has started in this process.

    Returns:
        Whether it was started here.
    """
    if dist.is_initialized():
        if (dist.get_rank(), dist.get_world_size()) != (rank, world):
            raise LayoutError(
                f"torch.distributed already makes this process rank {dist.get_rank()} of {dist.get_world_size()}; "
                f"it cannot also be rank {rank} of {world}: give the model processes of its own"
            )
        return False
    store, address = (None, rendezvous) if isinstance(rendezvous, str) else (rendezvous or HashStore(), None)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo",
        store=store,
        init_method=address,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    return True


def _join(context: RankContext, *, rank: int, parallel: ParallelConfig, device: torch.device) -> RankContext:
    """A further model in a process that is a rank already; it may differ in what needs no groups of its own."""
    if (rank, device) != (context.rank, context.device) or not _same_groups(parallel, context.parallel):
        raise LayoutError(
            f"this process is rank {context.rank} of {context.parallel} on {context.device}, and cannot also be rank "
            f"{rank} of {parallel} on {device}; give that model processes of its own"
        )
    _SHARED.users += 1
    return replace(context, parallel=parallel)


def _same_groups(one: ParallelConfig, other: ParallelConfig) -> bool:
    sizes = [(each.tensor, each.pipeline, each.context, each.data, each.expert) for each in (one, other)]
    return sizes[0] == sizes[1]


def _choose_device(device: Device, local_device: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch finds no CUDA device here; use 'cpu' or 'auto'")
    if cpu.installed():
        raise ConfigError("this process already trains on CPU; start another process to train on CUDA")
    return torch.device("cuda", local_device)
