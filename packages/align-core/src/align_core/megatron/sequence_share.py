"""Context parallelism: which tokens of a micro-batch are this rank's, and what its queries attend to.

The packed tokens are cut into 2 C equal pieces for C ranks; rank c holds pieces c and 2C - 1 - c, so that under causal
attention all ranks have about the same work. Sequences may lie across pieces. Keys and values of all tokens are
gathered in each layer, and each run of queries of one sequence attends to the keys of that sequence up to its own end.

Source: the pairing of pieces and the gathering of keys and values are those of Llama 3's training, Dubey et al. 2024,
arXiv:2407.21783, section 3.3.2.

Legend: P packed tokens with padding, L = P / C those of this rank, S the keys of all runs one after the other.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Queries of one sequence that lie next to each other on this rank; their keys end where they end."""

    query: int
    """First of them among this rank's tokens."""
    queries: int
    key: int
    """Packed position of the sequence's first token."""
    keys: int


class SequenceShare:
    """One rank's share of the tokens of one micro-batch."""

    def __init__(self, lengths: NDArray[np.int64], *, rank: int, ranks: int, device: torch.device) -> None:
        """`lengths` of all sequences, padding included; their sum is a multiple of 2 `ranks`."""
        total = int(lengths.sum())
        self._device = device
        self._ends = np.cumsum(lengths)
        self._pieces = [
            np.arange(total).reshape(2 * ranks, -1)[[owner, 2 * ranks - 1 - owner]] for owner in range(ranks)
        ]
        self._own = self._pieces[rank]

    @cached_property
    def own(self) -> Tensor:
        """int64 [L], packed positions of this rank's tokens."""
        return torch.from_numpy(self._own.reshape(-1)).to(self._device)

    @cached_property
    def runs(self) -> list[Run]:
        """In the order of this rank's tokens, of which each belongs to one."""
        found, query = [], 0
        for piece in self._own:
            position, end = int(piece[0]), int(piece[-1]) + 1
            while position < end:
                sequence = int(np.searchsorted(self._ends, position, side="right"))
                stop = min(end, int(self._ends[sequence]))
                first = int(self._ends[sequence - 1]) if sequence else 0
                found.append(Run(query=query, queries=stop - position, key=first, keys=stop - first))
                query += stop - position
                position = stop
        return found

    @cached_property
    def keys(self) -> Tensor:
        """int64 [S], packed positions of the keys of all runs."""
        index = np.concatenate([np.arange(run.key, run.key + run.keys) for run in self.runs])
        return torch.from_numpy(index).to(self._device)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """int32 [runs + 1] each, where the queries and the keys of each run begin."""
        counts = np.asarray([[0, *(run.queries for run in self.runs)], [0, *(run.keys for run in self.runs)]])
        queries, keys = torch.from_numpy(np.cumsum(counts, axis=1).astype(np.int32)).to(self._device)
        return queries, keys

    def whole(self, part: Tensor, *, shared_work: bool) -> Tensor:
        """[L, ...] of every rank to [P, ...] in packed order, on every rank.

        Args:
            shared_work: ranks do different things with it, so that their gradients add up; False where all ranks
                compute the same, and each needs the gradient of its own tokens only.
        """
        gathered: Tensor = gather_from_sequence_parallel_region(
            part.contiguous(),
            tensor_parallel_output_grad=shared_work,
            group=parallel_state.get_context_parallel_group(),
        )
        return gathered.index_select(0, self._order)

    @cached_property
    def _order(self) -> Tensor:
        """int64 [P], where each packed token is among the tokens of all ranks in turn."""
        return torch.from_numpy(np.argsort(np.concatenate([own.reshape(-1) for own in self._pieces]))).to(self._device)
