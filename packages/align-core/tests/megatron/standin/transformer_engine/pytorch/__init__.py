"""Linear layers and attention, by the documentation of transformer_engine.pytorch."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_engine.pytorch import distributed, fp8, ops

__all__ = ["distributed", "fp8", "ops"]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        parts = [torch.empty_like(grad) for _ in range(ctx.group.size())]
        dist.all_gather(parts, grad.contiguous(), group=ctx.group)
        return torch.cat(parts), None


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _reduce_scatter(x: Tensor, group: Any) -> Tensor:
    whole = x.contiguous().clone()
    dist.all_reduce(whole, group=group)
    return whole.chunk(group.size())[group.rank()].contiguous()


class _Module(nn.Module):
    """Every module of Transformer Engine has an extra state, and so a key of that name in its state dict."""

    def get_extra_state(self) -> Tensor:
        """Empty without fp8."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Nothing to set."""


class Linear(_Module):
    """y = x W^T + b, cut over a group by rows ("column") or by columns ("row")."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sequence_parallel: bool,
        fuse_wgrad_accumulation: bool,
        tp_group: Any,
        tp_size: int,
        get_rng_state_tracker: Any,
        init_method: Any,
        bias: bool,
        return_bias: bool,
        parallel_mode: str | None,
        params_dtype: torch.dtype,
        device: Any,
        rng_tracker_name: str | None = None,
    ) -> None:
        super().__init__()
        assert not fuse_wgrad_accumulation
        assert not return_bias
        del get_rng_state_tracker, rng_tracker_name, device
        self._group, self._size, self._mode = tp_group, tp_size, parallel_mode
        self._sequence = sequence_parallel and tp_size > 1
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        self.weight = nn.Parameter(torch.empty(rows, columns, dtype=params_dtype))
        init_method(self.weight)
        self.bias = nn.Parameter(torch.zeros(rows, dtype=params_dtype)) if bias else None
        for parameter, axis in ((self.weight, 0 if parallel_mode == "column" else 1), (self.bias, 0)):
            if parameter is not None:
                parameter.tensor_model_parallel = parallel_mode is not None
                parameter.partition_dim, parameter.partition_stride = axis, 1

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """[tokens, 1, in] to [tokens, 1, out]."""
        del is_first_microbatch
        if self._size > 1 and self._mode == "column":
            x = (_Gather if self._sequence else _Copy).apply(x, self._group)
        y = F.linear(x, self.weight, self.bias)
        if self._size > 1 and self._mode == "row":
            y = (_Scatter if self._sequence else _Sum).apply(y, self._group)
        return y


class LayerNormLinear(Linear):
    """The norm of x, then the product; the norm's weight belongs to this module."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        eps: float,
        normalization: str,
        return_layernorm_output: bool,
        zero_centered_gamma: bool,
        **settings: Any,
    ) -> None:
        super().__init__(in_features, out_features, **settings)
        assert (normalization, return_layernorm_output, zero_centered_gamma) == ("RMSNorm", False, False)
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(torch.ones(in_features, dtype=settings["params_dtype"]))
        self.layer_norm_weight.sequence_parallel = settings["sequence_parallel"]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        """As `Linear`."""
        normed = F.rms_norm(x, (x.shape[-1],), self.layer_norm_weight, self.eps)
        return super().forward(normed, is_first_microbatch)


class DotProductAttention(_Module):
    """Attention over packed sequences in the format thd."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        *,
        num_gqa_groups: int,
        attention_dropout: float,
        attn_mask_type: str,
        sequence_parallel: bool,
        tp_size: int,
        get_rng_state_tracker: Any,
        tp_group: Any,
        layer_number: int,
        attention_type: str,
        softmax_scale: float | None,
    ) -> None:
        super().__init__()
        assert (attn_mask_type, attention_type, attention_dropout) == ("causal", "self", 0.0)
        del sequence_parallel, get_rng_state_tracker, tp_group, layer_number
        self._heads = (num_attention_heads // tp_size, num_gqa_groups // tp_size, kv_channels)
        self._scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        qkv_format: str,
        cu_seqlens_q: Tensor,
        cu_seqlens_kv: Tensor,
        max_seqlen_q: int,
        max_seqlen_kv: int,
        attn_mask_type: str,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        """[tokens, heads, features] to [tokens, heads * features]; every bound is checked against the tokens."""
        assert (qkv_format, attn_mask_type, attention_mask) == ("thd", "padding_causal", None)
        assert cu_seqlens_q_padded is None
        assert cu_seqlens_kv_padded is None
        assert not any(value is not None for value in others.values()), others
        queries, groups, features = self._heads
        assert query.shape[1:] == (queries, features)
        assert key.shape[1:] == value.shape[1:] == (groups, features)
        assert cu_seqlens_q.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_kv)
        bounds = cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in pairwise(bounds)]
        assert (bounds[0], bounds[-1], max(lengths)) == (0, len(query), max_seqlen_q)
        assert max_seqlen_q == max_seqlen_kv
        found = []
        for part in zip(query.split(lengths), key.split(lengths), value.split(lengths)):
            q, k, v = (x.transpose(0, 1)[None] for x in part)
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self._scale, enable_gqa=queries != groups
            )
            found.append(attended[0].transpose(0, 1).flatten(1))
        return torch.cat(found)


class GroupedLinear(_Module):
    """Derived from at import, never made."""


class RMSNorm(_Module):
    """Never made: our own norm is."""


class LayerNorm(_Module):
    """Never made."""
