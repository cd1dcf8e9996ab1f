"""One micro-batch on the device: its sequences end to end, and what attention, rotary positions and losses need of it.

Padding exists at the end only, so that tensor parallelism can cut the tokens evenly; it is one more sequence, which no
loss sees. Knows nothing about the model and the pipeline.

Legend: B sequences, N their tokens, P = N plus padding, L the longest of a bucket.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from align_algos.errors import NonFiniteError
from align_core.megatron.rotary import cos_and_sin
from align_core.megatron.sequence_share import SequenceShare
from align_core.types import Batch


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Sequences of similar length side by side, the short ones padded at their end with any token.

    Under causal attention no token sees what comes after it, so the padding needs no mask; its output is dropped.
    """

    index: Tensor
    """int64 [b * L], the packed position of each entry."""
    real: Tensor
    """int64 [tokens], the entries that are not padding."""
    sequences: int


@dataclass
class Packed(PackedSeqParams):  # type: ignore[misc]
    """What the layers get to know about the packing.

    `qkv_format` stays unset: megatron-core's "thd" would rotate sequence by sequence, with a device synchronisation in
    every layer, where rotation by `positions` is one operation.
    """

    lengths: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """int64, tokens of each sequence, padding included as one more."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    share: SequenceShare | None = None
    """This rank's tokens where they are cut over ranks; then the layers see these alone."""
    _angles: tuple[Tensor, Tensor] | None = None

    @property
    def uniform(self) -> int | None:
        """The length of all sequences, if they have one and are not cut."""
        if self.share is not None:
            return None
        return int(self.lengths[0]) if np.all(self.lengths == self.lengths[0]) else None

    @cached_property
    def positions(self) -> Tensor:
        """int64 [P], position of each token in its sequence; of this rank's tokens where they are cut."""
        starts = np.cumsum(self.lengths) - self.lengths
        positions = _to(np.arange(self.lengths.sum()) - np.repeat(starts, self.lengths), self.device)
        return positions if self.share is None else positions[self.share.own]

    def cos_and_sin(self, frequencies: Tensor) -> tuple[Tensor, Tensor]:
        """Of the angles of each token, float32 [P, D/2] each; computed for the first layer, kept for the others."""
        if self._angles is None:
            self._angles = cos_and_sin(self.positions, frequencies)
        return self._angles

    @cached_property
    def _bucketing(self) -> tuple[tuple[Bucket, ...], Tensor]:
        return _buckets(self.lengths, self.device)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The sequences, grouped by similar length."""
        return self._bucketing[0]

    @property
    def order(self) -> Tensor:
        """int64 [P], where each token is among the tokens of all buckets in turn."""
        return self._bucketing[1]


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Tensors of one micro-batch."""

    indices: NDArray[np.int64]
    """int64 [B], which sequences of the whole batch these are."""
    batch: Batch
    """The same sequences with their columns, unpadded; without any for a micro-batch of padding."""
    tokens: Tensor
    """int64 [1, P]."""
    targets: Tensor
    """int64 [N], the token after each one; 0 after the last of a sequence."""
    is_first: Tensor
    """bool [N], True at the first token of a sequence."""
    last: Tensor
    """int64 [B], position of each sequence's last token."""
    packed: Packed

    @property
    def own_padding(self) -> Tensor:
        """bool [1, L], where `own_tokens` are none of the batch's."""
        padding = torch.arange(self.tokens.shape[1], device=self.tokens.device)[None] >= len(self.targets)
        share = self.packed.share
        return padding if share is None else padding[:, share.own]

    @property
    def own_tokens(self) -> Tensor:
        """int64 [1, L], what this rank's layers see: all, or its share."""
        share = self.packed.share
        return self.tokens if share is None else self.tokens[:, share.own]

    def target_rows(self) -> Tensor:
        """int64, positions of the tokens that a loss looks at: inside the mask, or imitated beside it."""
        learnt_N = self.batch.mask
        if "sft_weight" in self.batch.token_columns:
            learnt_N = learnt_N | (self.batch.token_column("sft_weight").astype(np.float32) > 0)
        return _to(np.flatnonzero(learnt_N), self.tokens.device)

    def not_finite(self, values: Tensor) -> NonFiniteError | None:
        """The error that says where in the batch values of the model, [N] or [B], are not finite; None if all are."""
        found = values.detach().float().cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(found))
        if not len(bad):
            return None
        first = int(bad[0])
        if len(found) == len(self.targets):
            row = int(np.searchsorted(self.batch.offsets, first, side="right")) - 1
            where = f"at token {first - int(self.batch.offsets[row])} of sequence {self.indices[row]}"
        else:
            where = f"for sequence {self.indices[first]}"
        return NonFiniteError(
            f"the model gives {found[first]} {where} ({len(bad)} of the {len(found)} values of its micro-batch are not "
            "finite); look at the weights that it was loaded from, or lower optimizer.lr"
        )

    def token_column(self, name: str) -> Tensor:
        """The per-token column on the device."""
        return _to(self.batch.token_column(name), self.tokens.device)

    def sequence_column(self, name: str) -> Tensor:
        """The per-sequence column on the device."""
        return _to(self.batch.sequence_column(name), self.tokens.device)


def pack(
    whole: Batch,
    indices: NDArray[np.int64],
    *,
    multiple: int,
    device: torch.device,
    least: int = 1,
    share: tuple[int, int] = (0, 1),
) -> MicroBatch:
    """The sequences `indices` of `whole`, padded to a multiple of `multiple` tokens, and to at least `least`.

    Args:
        share: rank and number of the ranks over which the tokens are cut.
    """
    batch = whole.select(indices)
    count = len(batch.tokens)
    padding = -(-max(count, least) // multiple) * multiple - count
    lengths = np.concatenate([batch.lengths, [padding]] if padding else [batch.lengths]).astype(np.int64)
    targets = np.zeros(count, np.int64)
    targets[:-1] = batch.tokens[1:]
    last = batch.offsets[1:] - 1
    targets[last] = 0
    is_first = np.zeros(count, np.bool_)
    is_first[batch.offsets[:-1]] = True
    return MicroBatch(
        indices=indices,
        batch=batch,
        tokens=_to(np.pad(batch.tokens.astype(np.int64), (0, padding))[None], device),
        targets=_to(targets, device),
        is_first=_to(is_first, device),
        last=_to(last, device),
        packed=_packed(lengths, device, share),
    )


def _packed(lengths: NDArray[np.int64], device: torch.device, share: tuple[int, int]) -> Packed:
    rank, ranks = share
    cu_seqlens = _to(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32), device)
    longest = int(lengths.max())
    return Packed(
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        lengths=lengths,
        device=device,
        share=SequenceShare(lengths, rank=rank, ranks=ranks, device=device) if ranks > 1 else None,
    )


def _buckets(lengths: NDArray[np.int64], device: torch.device) -> tuple[tuple[Bucket, ...], Tensor]:
    starts = np.cumsum(lengths) - lengths
    buckets = []
    tokens_in_order = []
    # Sequences whose lengths need the same number of bits: none is padded to more than twice its length.
    width = np.frexp(lengths)[1]
    for bits in np.unique(width):
        rows = np.flatnonzero(width == bits)
        longest = int(lengths[rows].max())
        offset = np.arange(longest)[None]
        index = (starts[rows, None] + np.minimum(offset, lengths[rows, None] - 1)).reshape(-1)
        real = np.flatnonzero((offset < lengths[rows, None]).reshape(-1))
        buckets.append(Bucket(index=_to(index, device), real=_to(real, device), sequences=len(rows)))
        tokens_in_order.append(index[real])
    return tuple(buckets), _to(np.argsort(np.concatenate(tokens_in_order)), device)


def _to(array: NDArray[np.generic], device: torch.device) -> Tensor:
    # A copy: columns may be read-only views that torch would refuse to wrap.
    held = torch.from_numpy(np.array(array))
    if device.type != "cuda":
        return held.to(device)
    # From pageable memory the host would wait for all that the device has to do before, and could not queue the loss
    # and the backward pass behind the forward pass.
    return held.pin_memory().to(device, non_blocking=True)
