"""Causal attention within each packed sequence, after rotary positions: megatron-core's core attention, ours.

Attention is torch's: dense where all sequences have one length; for other lengths `varlen_attn` on CUDA in half
precision, elsewhere scaled_dot_product_attention over sequences of similar length. Knows nothing about parallel ranks:
heads and tokens come already cut.

Legend: P packed tokens, G key/value heads of this rank, Q query heads (a multiple of G), D features a head.
"""

import contextlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

from align_core.megatron.microbatch import Packed
from align_core.megatron.rotary import rotate
from align_core.megatron.sequence_share import SequenceShare

_VARLEN = inspect.signature(varlen.varlen_attn).parameters
# torch 2.10 says is_causal, later ones a window of (everything before, nothing after).
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _VARLEN else {"window_size": (-1, 0)}

_FASTEST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """megatron-core's core attention over packed sequences; the constructor takes what megatron-core passes."""

    def __init__(self, config: object, *, frequencies: Tensor, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale
        self.frequencies = frequencies  # not a buffer: bf16 models must keep it in float32

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: Packed,
        **_: object,
    ) -> Tensor:
        """Attend.

        Args:
            query: [P, 1, Q, D].
            key: [P, 1, G, D], and so is `value`.
            attention_mask: unused; attention is causal within each sequence.
        Returns:
            [P, 1, Q * D].
        """
        packed = packed_seq_params
        query, key = (rotate(part[:, 0], *packed.cos_and_sin(self.frequencies)) for part in (query, key))
        value = value[:, 0].contiguous()  # a view would keep queries and keys alive a second time
        return self.attend(query, key, value, packed).reshape(len(query), 1, -1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        """[P, Q, D], [P, G, D] twice, positions applied, to [P, Q, D]."""
        if packed.share is not None:
            return self._shared(query, key, value, packed.share)
        if packed.uniform is not None:
            return self._uniform(query, key, value, packed.uniform)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            bounds, longest = packed.cu_seqlens_q, packed.max_seqlen_q
            return self._varlen(query, key, value, (bounds, bounds), (longest, longest))
        return self._bucketed(query, key, value, packed)

    def _shared(self, query: Tensor, key: Tensor, value: Tensor, share: SequenceShare) -> Tensor:
        """This rank's queries on all ranks' keys and values."""
        key, value = share.whole(key, shared_work=True), share.whole(value, shared_work=True)
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            key, value = key.index_select(0, share.keys), value.index_select(0, share.keys)
            longest = (max(run.queries for run in share.runs), max(run.keys for run in share.runs))
            return self._varlen(query, key, value, share.bounds, longest)
        grouped = query.shape[1] != key.shape[1]
        results = []
        for run in share.runs:
            q = query[run.query : run.query + run.queries].transpose(0, 1)
            k, v = (part[run.key : run.key + run.keys].transpose(0, 1) for part in (key, value))
            seen = torch.ones(run.queries, run.keys, dtype=torch.bool, device=q.device).tril(run.keys - run.queries)
            found = F.scaled_dot_product_attention(
                q[None], k[None], v[None], attn_mask=seen, scale=self.scale, enable_gqa=grouped
            )
            results.append(found[0].transpose(0, 1))
        return torch.cat(results)

    def _varlen(
        self, query: Tensor, key: Tensor, value: Tensor, bounds: tuple[Tensor, Tensor], longest: tuple[int, int]
    ) -> Tensor:
        """Causal attention whose last query sees the last key, of each sequence."""
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in _VARLEN:
                grouped["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        result = varlen.varlen_attn(
            query, key, value, bounds[0], bounds[1], longest[0], longest[1], scale=self.scale, **_CAUSAL, **grouped
        )
        assert isinstance(result, Tensor)
        return result

    def _uniform(self, query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
        """Sequences of one length are a dense batch, for which torch has faster kernels."""
        q, k, v = (part.view(-1, length, *part.shape[1:]).transpose(1, 2) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        with sdpa_kernel(_FASTEST, set_priority=True) if query.is_cuda else contextlib.nullcontext():
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return attended.transpose(1, 2).flatten(0, 1)

    def _bucketed(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        results = []
        for bucket in packed.buckets:
            q, k, v = (
                part.index_select(0, bucket.index).view(bucket.sequences, -1, *part.shape[1:]).transpose(1, 2)
                for part in (query, key, value)
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            results.append(attended.transpose(1, 2).flatten(0, 1).index_select(0, bucket.real))
        return torch.cat(results).index_select(0, packed.order)
