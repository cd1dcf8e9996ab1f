"""Causal attention within each packed sequence, and rotary positions: the parts of the layer that are ours.

Attention is torch's: `varlen_attn` on CUDA in half precision, elsewhere scaled_dot_product_attention over sequences of
similar length. Knows nothing about parallel ranks: heads and tokens come already cut.

Legend: P packed tokens, G key/value heads of this rank, Q query heads (a multiple of G), D features a head.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.attention import varlen

from align_core.errors import ConfigError
from align_core.megatron.microbatch import Packed

_VARLEN = inspect.signature(varlen.varlen_attn).parameters
# torch 2.10 says is_causal, later ones a window of (everything before, nothing after).
_CAUSAL: dict[str, Any] = {"is_causal": True} if "is_causal" in _VARLEN else {"window_size": (-1, 0)}


class PackedAttention(MegatronModule):  # type: ignore[misc]
    """megatron-core's core attention over packed sequences; the constructor takes what megatron-core passes."""

    def __init__(self, config: object, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale

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
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
            attended = self._varlen(query, key, value, packed_seq_params)
        else:
            attended = self._bucketed(query, key, value, packed_seq_params)
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
        assert packed.order is not None
        return torch.cat(results).index_select(0, packed.order)


class Rotary(nn.Module):
    """Rotary angles of packed tokens, in the place of megatron-core's RotaryEmbedding.

    GPTModel first asks how many positions it needs and then for the angles of 0 .. n-1; the answer to the first
    question is whatever the second wants, here the position of each token.
    """

    def __init__(self, frequencies: Tensor) -> None:
        super().__init__()
        self.frequencies = frequencies  # not a buffer: bf16 models must keep it in float32

    def get_rotary_seq_len(
        self, context: object, decoder: object, decoder_input: object, config: object, packed: Packed
    ) -> Tensor:
        """The packed positions, int64 [P]; what else GPTModel passes is not needed."""
        del context, decoder, decoder_input, config
        assert packed.positions is not None
        return packed.positions

    def forward(self, positions_P: Tensor, **_: object) -> Tensor:
        """Angles, float32 [P, 1, 1, D]: the D/2 frequencies twice, for the two halves that rotate together."""
        angles = torch.outer(positions_P.float(), self.frequencies)
        return torch.cat([angles, angles], dim=-1)[:, None, None]


def rotary_frequencies(*, head_dim: int, theta: float, scaling: Mapping[str, object] | None) -> Tensor:
    """Radians a position turns each pair of features by, float32 [head_dim / 2].

    Args:
        scaling: Hugging Face's mapping with the key `rope_type`; None for plain rotary positions.
    Raises:
        ConfigError: another scaling than `linear` or `llama3`.
    Source: Su et al. 2021, arXiv:2104.09864, section 3.2.2; `llama3`: Llama 3.1's reference code and Hugging Face's
        modeling_rope_utils.py: long waves are stretched by `factor`, short ones kept, with a ramp between.
    """
    plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return plain
    kind = scaling.get("rope_type")
    if kind == "linear":
        return plain / _number(scaling, "factor")
    if kind != "llama3":
        raise ConfigError(f"rope_scaling of type {kind!r} is not supported; choose 'default', 'linear' or 'llama3'")
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    turns = _number(scaling, "original_max_position_embeddings") * plain / (2 * torch.pi)
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - keep) * plain / _number(scaling, "factor") + keep * plain


def _number(scaling: Mapping[str, object], key: str) -> float:
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"rope_scaling of type {scaling.get('rope_type')!r} needs a number {key!r}, got {value!r}")
    return float(value)
