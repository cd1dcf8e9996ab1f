"""Shares of packed tokens by hand."""

import numpy as np
import torch

from align_core.megatron.sequence_share import Run, SequenceShare

CPU = torch.device("cpu")


def test_each_rank_gets_a_piece_from_either_end() -> None:
    """Sequences of 5 and 3 tokens in four pieces of two: rank 0 has 0 1 and 6 7, rank 1 has 2 3 and 4 5."""
    lengths = np.asarray([5, 3])
    first, second = (SequenceShare(lengths, rank=rank, ranks=2, device=CPU) for rank in range(2))
    assert first.own.tolist() == [0, 1, 6, 7]
    assert first.runs == [Run(query=0, queries=2, key=0, keys=2), Run(query=2, queries=2, key=5, keys=3)]
    assert second.own.tolist() == [2, 3, 4, 5]
    assert second.runs == [
        Run(query=0, queries=2, key=0, keys=4),
        Run(query=2, queries=1, key=0, keys=5),
        Run(query=3, queries=1, key=5, keys=1),
    ]
    assert second.keys.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    queries, keys = second.bounds
    assert queries.tolist() == [0, 2, 3, 4]
    assert keys.tolist() == [0, 4, 9, 10]
