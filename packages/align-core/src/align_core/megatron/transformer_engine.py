"""Layers of NVIDIA's Transformer Engine in place of torch's: norm and product in one, and its attention.

Chosen by `training.layers`. megatron-core wraps Transformer Engine; here its parts are put together for our models, and
its names and its layout of packed sequences are translated: everyone else goes on knowing weights by their plain names.
Tests run megatron-core's wrappers over a stand-in, because Transformer Engine must be built against CUDA; on a GPU this
module has yet to be seen.
"""

import importlib.util
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from align_convert.config import ModelConfig
from align_core.config import TrainerConfig
from align_core.errors import ConfigError, choices
from align_core.megatron.attention import PackedAttention
from align_core.megatron.microbatch import Packed

_PACKAGE = "transformer_engine"
_DEVICES = ("cuda",)
_INSTALL = "pip install --no-build-isolation 'transformer_engine[pytorch]' (it compiles against CUDA)"
# Norms that are fused into the product that reads them.
_FUSED_NAMES = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}


class FusedLayers(NamedTuple):
    """Modules for a layer specification."""

    norm_column: type[nn.Module]
    row: type[nn.Module]
    attention: type[nn.Module]


def uses_transformer_engine(config: TrainerConfig, model: ModelConfig) -> bool:
    """Whether this model gets its layers.

    Raises:
        ConfigError: it was asked for, and is not there or cannot do what else was asked for.
    """
    wanted = config.training.layers
    if wanted == "torch":
        return False
    obstacle = _obstacle(config, model)
    if obstacle is None:
        return True
    if wanted == "auto":
        return False
    raise ConfigError(f"training.layers is 'transformer_engine', but {obstacle}; or set training.layers to 'torch'")


def _obstacle(config: TrainerConfig, model: ModelConfig) -> str | None:
    device = "cpu" if config.training.device == "cpu" or not torch.cuda.is_available() else "cuda"
    if importlib.util.find_spec(_PACKAGE) is None:
        return f"Transformer Engine is not installed: {_INSTALL}"
    if device not in _DEVICES:
        return f"Transformer Engine needs a CUDA device, and the model is on {device!r}"
    if model.table.has_experts:
        return "experts are made of torch's layers only"
    if config.lora.rank:
        return "adapters are on torch's layers only: set lora.rank to 0"
    if forgotten := config.training.recomputed & {"norm", "attention"}:
        return f"its layers keep what recompute would forget: leave {choices(forgotten)} out of recompute_modules"
    return None


def fused_layers() -> FusedLayers:
    """megatron-core's wrappers of Transformer Engine, imported when they are needed."""
    from megatron.core.extensions.transformer_engine import (  # noqa: PLC0415  (brings Transformer Engine)
        TELayerNormColumnParallelLinear,
        TERowParallelLinear,
    )

    return FusedLayers(TELayerNormColumnParallelLinear, TERowParallelLinear, EngineAttention)


def plain_name(name: str) -> str:
    """The name that a weight has without fusion, which checkpoints and plans use."""
    for fused, plain in _FUSED_NAMES.items():
        name = name.replace(fused, plain)
    return name


class EngineAttention(PackedAttention):
    """Rotary positions as ever; attention by Transformer Engine, over tokens end to end with the sequences' bounds."""

    def __init__(self, config: Any, *, frequencies: Tensor, **settings: Any) -> None:
        super().__init__(config, frequencies=frequencies, softmax_scale=settings.get("softmax_scale"))
        from megatron.core.extensions.transformer_engine import TEDotProductAttention  # noqa: PLC0415

        # Tokens that are cut over ranks are our own attention's.
        self.engine = None if config.context_parallel_size > 1 else TEDotProductAttention(config=config, **settings)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> Tensor:
        """[P, Q, D], [P, G, D] twice, to [P, Q * D]."""
        if self.engine is None:
            return super().attend(query, key, value, packed)
        attended: Tensor = self.engine(
            query,
            key,
            value,
            None,
            attn_mask_type=AttnMaskType.padding_causal,
            packed_seq_params=thd(packed),
        )
        return attended


def thd(packed: Packed) -> PackedSeqParams:
    """The packing as Transformer Engine is told of it: [tokens, heads, features] and where sequences begin and end."""
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=packed.cu_seqlens_q,
        cu_seqlens_kv=packed.cu_seqlens_kv,
        max_seqlen_q=packed.max_seqlen_q,
        max_seqlen_kv=packed.max_seqlen_kv,
    )
