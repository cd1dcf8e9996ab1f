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
        if packed.uniform is not None:
            attended = self._uniform(query, key, value, packed.uniform)
        elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            attended = self._varlen(query, key, value, packed)
        else:
            attended = self._bucketed(query, key, value, packed)
        return attended.reshape(len(query), 1, -1)

    def _varlen(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in _VARLEN:
                grouped["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        longest = packed.max_seqlen_q
        bounds = packed.cu_seqlens_q
        result = varlen.varlen_attn(
            query, key, value, bounds, bounds, longest, longest, scale=self.scale, **_CAUSAL, **grouped
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
