"""A process as a rank: sharing groups, and impossible requests."""

import pytest
import torch
import torch.distributed as dist

from align_core.config import ParallelConfig
from align_core.errors import ConfigError, LayoutError
from align_core.megatron import close_rank, init_rank


def test_models_of_one_process_share_its_groups() -> None:
    first = init_rank(parallel=ParallelConfig(), device="cpu")
    assert init_rank(parallel=ParallelConfig(), device="cpu") == first
    close_rank()
    assert dist.is_initialized()
    close_rank()
    assert not dist.is_initialized()
    close_rank()


def test_a_process_is_not_a_rank_of_two_layouts() -> None:
    init_rank(parallel=ParallelConfig(), device="cpu")
    with pytest.raises(LayoutError, match=r"cannot also be rank 1 of .*tensor=2"):
        init_rank(parallel=ParallelConfig(tensor=2), rank=1, device="cpu")
    close_rank()


def test_a_world_that_something_else_started_is_used_and_left_alone() -> None:
    """As when an engine of the same process came first; the other way round, it may also have ended the world."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    init_rank(parallel=ParallelConfig(), device="cpu")
    close_rank()
    assert dist.is_initialized()
    with pytest.raises(LayoutError, match="already makes this process rank 0 of 1; it cannot also be rank 1 of 2"):
        init_rank(parallel=ParallelConfig(data=2), rank=1, rendezvous="file:///nowhere", device="cpu")
    dist.destroy_process_group()
    init_rank(parallel=ParallelConfig(), device="cpu")
    dist.destroy_process_group()
    close_rank()


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(LayoutError, match="rank 2 is outside a world of 2; use 0 to 1"):
        init_rank(parallel=ParallelConfig(tensor=2), rank=2, device="cpu")


def test_several_ranks_need_a_meeting_point() -> None:
    with pytest.raises(ConfigError, match="2 ranks need a rendezvous"):
        init_rank(parallel=ParallelConfig(data=2), rank=0, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="torch finds no CUDA device"):
        init_rank(parallel=ParallelConfig(), device="cuda")
