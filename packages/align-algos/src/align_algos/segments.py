"""Sums, lengths and values of sequences, without a check: for losses, which have checked mask and offsets once.

Each check of offsets waits for the device. `reductions` has the same for everybody else, with checks.

Legend: B sequences, N flat tokens; sequence b is the tokens offsets[b] to offsets[b+1].
"""

import torch
from torch import Tensor


def sums(x_N: Tensor, offsets: Tensor) -> Tensor:
    """Sum of each sequence, [B]."""
    # index_add would add with atomics on CUDA, in a new order each run.
    return torch.segment_reduce(x_N, "sum", offsets=offsets.to(x_N.device, torch.int64), initial=0.0, unsafe=True)


def lengths(mask_N: Tensor, offsets: Tensor) -> Tensor:
    """Number of tokens inside the mask of each sequence, int64 [B]."""
    running = torch.cat([mask_N.new_zeros(1, dtype=torch.int64), mask_N.cumsum(0)])
    return running[offsets.to(mask_N.device, torch.int64)].diff()


def spread(x_B: Tensor, offsets: Tensor, num_tokens: int) -> Tensor:
    """Each token gets the value of its sequence, [N]; N is given, since the device would have to be asked."""
    return torch.repeat_interleave(x_B, offsets.diff().to(x_B.device, torch.int64), output_size=num_tokens)
