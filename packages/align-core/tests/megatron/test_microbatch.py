"""Tensors of a micro-batch, worked by hand."""

import numpy as np
import torch

from align_core.megatron.microbatch import pack
from align_core.types import Batch

CPU = torch.device("cpu")


def test_pack_lays_sequences_end_to_end_and_pads_the_end() -> None:
    """Sequences 2 and 0 of three, 3 + 2 tokens, padded to a multiple of 4: one padding sequence of 3 tokens."""
    whole = Batch.of([[10, 11], [20], [30, 31, 32]], columns={"group": np.asarray([1, 2, 3])})
    micro = pack(whole, np.asarray([0, 2]), multiple=4, device=CPU)
    assert micro.tokens.tolist() == [[10, 11, 30, 31, 32, 0, 0, 0]]
    assert micro.targets.tolist() == [11, 0, 31, 32, 0]
    assert micro.is_first.tolist() == [True, False, True, False, False]
    assert micro.last.tolist() == [1, 4]
    assert micro.packed.positions is not None
    assert micro.packed.positions.tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert micro.packed.cu_seqlens_q.tolist() == [0, 2, 5, 8]
    assert micro.sequence_column("group").tolist() == [1, 3]


def test_pack_without_sequences_is_padding_alone() -> None:
    micro = pack(Batch.of([[1, 2]]), np.zeros(0, np.int64), multiple=2, device=CPU)
    assert micro.tokens.shape == (1, 2)
    assert len(micro.targets) == len(micro.last) == 0


def test_buckets_hold_each_token_once() -> None:
    """The real entries of all buckets, put in `order`, are the packed tokens 0, 1, 2, ..."""
    lengths = (1, 9, 2, 17, 3, 8, 1)
    whole = Batch.of([np.arange(n, dtype=np.int32) for n in lengths])
    packed = pack(whole, np.arange(len(lengths)), multiple=3, device=CPU).packed
    real = torch.cat([bucket.index[bucket.real] for bucket in packed.buckets])
    assert packed.order is not None
    assert real[packed.order].tolist() == list(range(42))
    assert [bucket.sequences for bucket in packed.buckets] == [3, 2, 2, 1]  # 1 1 1(padding) | 2 3 | 9 8 | 17
