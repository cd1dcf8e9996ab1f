"""Megatron's `args` Namespace <-> our model config and layout.

Written with the spellings of old and new Megatrons side by side, so that each finds the one it reads. Reading back is
for directories that nobody put a config.json beside; what args cannot tell exactly is an error, not a guess.
Source: arguments compared and restored by Megatron-LM core_v0.17.0 (check_checkpoint_args, load_args_from_checkpoint).
"""

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeGuard

import torch

from align_convert.config import Head, ModelConfig
from align_convert.dtypes import dtype_name
from align_convert.errors import ConfigError, FormatError, LayoutError
from align_convert.families import FAMILIES
from align_convert.formats.megatron_names import Naming
from align_convert.layout import Layout, stages
from align_convert.rules import Family

# Of a Llama model; what a family has otherwise is in its `megatron_args`.
_LLAMA: Mapping[str, object] = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "rotary_interleaved": False,
    "rotary_percent": 1.0,
    "apply_layernorm_1p": False,
}

_HF_ROPE_SCALING = "hf_rope_scaling"  # ours: Megatron ignores args that it does not know
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def args_from_config(
    config: ModelConfig, layout: Layout, *, dtype: torch.dtype, iteration: int, naming: Naming = "local"
) -> Namespace:
    """The args of a checkpoint: plain values and a torch.dtype only, so that they load under weights_only."""
    return Namespace(
        **{**_LLAMA, **config.table.megatron_args},
        **_model_args(config),
        **_expert_args(config),
        **_layout_args(config, layout),
        add_position_embedding=True,
        moe_grouped_gemm=naming == "te-grouped",
        attention_dropout=0.0,
        hidden_dropout=0.0,
        apply_query_key_layer_scaling=False,
        squared_relu=False,
        transformer_impl="transformer_engine" if naming.startswith("te") else "local",
        use_legacy_models=naming == "legacy",
        ckpt_format="torch",
        params_dtype=dtype,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        iteration=iteration,
        consumed_train_samples=0,
        consumed_valid_samples=0,
        no_save_optim=True,
        no_save_rng=True,
    )


def _model_args(config: ModelConfig) -> dict[str, object]:
    return {
        **rope_args(config.rope_scaling),
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_size,
        "num_attention_heads": config.num_heads,
        "group_query_attention": config.num_kv_heads != config.num_heads,
        "num_query_groups": config.num_kv_heads,
        "kv_channels": config.head_dim,
        "seq_length": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "norm_epsilon": config.norm_eps,  # up to core 0.16
        "layernorm_epsilon": config.norm_eps,  # from core 0.17
        "use_rotary_position_embeddings": True,  # how core 0.8 and older say position_embedding_type
        "rotary_base": config.rope_theta,
        "untie_embeddings_and_output_weights": not config.tied_embeddings,
    }


def rope_args(scaling: Mapping[str, object] | None) -> dict[str, object]:
    """Megatron's settings, and Hugging Face's mapping beside them, from which it comes back whatever Megatron knows."""
    llama3, linear = _is_llama3_scaling(scaling), _is_linear_scaling(scaling)
    factor = (scaling or {}).get("factor")
    return {
        "use_rope_scaling": llama3,
        "rope_scaling_factor": factor if llama3 else 8.0,
        "rotary_seq_len_interpolation_factor": factor if linear else None,
        _HF_ROPE_SCALING: None if scaling is None else dict(scaling),
    }


def _expert_args(config: ModelConfig) -> dict[str, object]:
    """Of a router that takes the softmax over the chosen experts only, which is what these families compute."""
    if config.num_experts is None:
        return {"num_experts": None}
    return {
        "num_experts": config.num_experts,
        "moe_ffn_hidden_size": config.expert_ffn_size,
        "moe_router_topk": config.experts_per_token,
        "moe_router_pre_softmax": not config.renormalizes_experts,
        "moe_layer_freq": 1,
    }


def _layout_args(config: ModelConfig, layout: Layout) -> dict[str, object]:
    chunk = config.num_layers // (layout.pp * layout.vp)
    even = layout.chunk_layers is None
    return {
        **_uneven_args(config.num_layers, layout),
        "vocab_size": config.vocab_size,
        "padded_vocab_size": layout.padded_vocab(config.vocab_size),
        "make_vocab_size_divisible_by": layout.vocab_divisor,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp if layout.vp > 1 else None,
        "num_layers_per_virtual_pipeline_stage": chunk if layout.vp > 1 and even else None,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.tp,
        "context_parallel_size": 1,
        "data_parallel_size": layout.ep,
        "world_size": layout.tp * layout.pp * layout.ep,
    }


def _uneven_args(num_layers: int, layout: Layout) -> dict[str, object]:
    """How Megatron says that stages differ: by the layers at the two ends, or by a drawing of the whole pipeline."""
    chunks = layout.chunk_layers
    if chunks is None:
        return {}
    first, last = (sum(chunks[stage :: layout.pp]) for stage in (0, layout.pp - 1))
    try:
        by_ends = stages(num_layers, pp=layout.pp, vp=layout.vp, first=first, last=last) == chunks
    except LayoutError:
        by_ends = False
    if by_ends:
        return {"decoder_first_pipeline_num_layers": first, "decoder_last_pipeline_num_layers": last}
    drawn = ["t" * count for count in chunks]
    drawn[0], drawn[-1] = "E" + drawn[0], drawn[-1] + "L"
    return {"pipeline_model_parallel_layout": "|".join(drawn)}


def config_from_args(args: Namespace, *, head: Head, dtype: torch.dtype) -> ModelConfig:
    """Rebuild the model's description, in the form of a Hugging Face config, from args alone.

    Raises:
        ConfigError: args describe another kind of model, or lack something; a config.json beside would settle it.
    """
    family = _family_from_args(args)
    hf: dict[str, object] = {
        "architectures": [family.lm_architecture],
        "model_type": family.model_type,
        "vocab_size": _need(args, "vocab_size"),
        "hidden_size": _need(args, "hidden_size"),
        "intermediate_size": _need(args, "ffn_hidden_size"),
        "num_hidden_layers": _need(args, "num_layers"),
        "num_attention_heads": _need(args, "num_attention_heads"),
        "max_position_embeddings": _need(args, "max_position_embeddings"),
        "hidden_act": "silu",
        "rms_norm_eps": _need(args, "norm_epsilon", "layernorm_epsilon"),
        "rope_theta": _need(args, "rotary_base"),
        "tie_word_embeddings": not _need(args, "untie_embeddings_and_output_weights"),
        "torch_dtype": dtype_name(dtype),
    }
    grouped = getattr(args, "group_query_attention", False)
    hf["num_key_value_heads"] = _need(args, "num_query_groups") if grouped else hf["num_attention_heads"]
    if getattr(args, "kv_channels", None) is not None:
        hf["head_dim"] = args.kv_channels
    hf["rope_scaling"] = _rope_scaling_from_args(args)
    if family.has_experts:
        hf[family.experts_keys[0]] = _need(args, "num_experts")
        hf[family.expert_ffn_key] = _need(args, "moe_ffn_hidden_size", "ffn_hidden_size")
        hf["num_experts_per_tok"] = _need(args, "moe_router_topk")
        hf["norm_topk_prob"] = not getattr(args, "moe_router_pre_softmax", False)
    return ModelConfig.from_hf(hf).with_head(head)


def _rope_scaling_from_args(args: Namespace) -> object:
    """Hugging Face's mapping, or None; anything else that a file holds is refused where configs are read."""
    stored: object = getattr(args, _HF_ROPE_SCALING, None)
    if stored is not None:
        return stored
    if getattr(args, "use_rope_scaling", False):
        return {"rope_type": "llama3", "factor": _need_number(args, "rope_scaling_factor"), **_LLAMA3_ROPE}
    if getattr(args, "rotary_seq_len_interpolation_factor", None) is not None:
        return {"rope_type": "linear", "factor": _need_number(args, "rotary_seq_len_interpolation_factor")}
    return None


def _family_from_args(args: Namespace) -> Family:
    """The first family that these args fit; an absent one fits."""
    has_experts = getattr(args, "num_experts", None) is not None
    problems = []
    for family in FAMILIES.values():
        wanted = {**_LLAMA, **family.megatron_args}
        found = {key: getattr(args, key, value) for key, value in wanted.items()}
        odd = [f"{key}={found[key]!r}" for key, value in wanted.items() if found[key] != value]
        if not odd and family.has_experts == has_experts:
            return family
        problems.append(odd)
    nearest: list[str] = min((odd for odd in problems if odd), key=len)
    text = ", ".join(nearest)
    known = ", ".join(sorted(FAMILIES))
    raise ConfigError(f"checkpoint args say {text}, which fits no known family; known: {known}")


def layout_from_args(args: Namespace, *, vocab_size: int) -> Layout:
    """The layout that wrote these args, with a vocabulary divisor that explains the padding actually found.

    Raises:
        FormatError: sizes are missing or contradict each other.
    """
    tp, pp = _count(args, "tensor_model_parallel_size"), _count(args, "pipeline_model_parallel_size")
    virtual = getattr(args, "virtual_pipeline_model_parallel_size", None)
    vp = 1 if virtual is None else _count(args, "virtual_pipeline_model_parallel_size")
    padded = getattr(args, "padded_vocab_size", None)
    divisor = getattr(args, "make_vocab_size_divisible_by", None) or 128
    ep = 1 if getattr(args, "expert_model_parallel_size", None) is None else _count(args, "expert_model_parallel_size")
    cut = getattr(args, "expert_tensor_parallel_size", None)
    if ep > 1 and cut not in (None, tp):
        raise FormatError(f"checkpoint args say expert_tensor_parallel_size={cut!r}; experts must be cut {tp} ways too")
    layout = Layout(tp=tp, pp=pp, vp=vp, ep=ep, vocab_divisor=divisor)
    if padded is None or layout.padded_vocab(vocab_size) == padded:
        return layout
    if not isinstance(padded, int) or padded < vocab_size or padded % tp:
        raise FormatError(
            f"checkpoint args say padded_vocab_size={padded!r}; it must be at least {vocab_size} and divisible by {tp}"
        )
    return replace(layout, vocab_divisor=padded // tp)


def check_args_match(args: Namespace, config: ModelConfig) -> None:
    """Refuse a config.json that does not describe the checkpoint beside it.

    Raises:
        ConfigError: naming the first difference.
    """
    for key, value in _model_args(config).items():
        if key in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"):
            found = getattr(args, key, value)
            if found != value:
                raise ConfigError(f"config.json makes {key} {value}, but the checkpoint args say {found!r}")


def knows_rope_scaling(config: ModelConfig) -> bool:
    """Whether args make Megatron compute the model's positions; where not, Megatron leaves them unscaled."""
    scaling = config.rope_scaling
    return scaling is None or _is_llama3_scaling(scaling) or _is_linear_scaling(scaling)


def _is_linear_scaling(scaling: Mapping[str, object] | None) -> bool:
    """Whether Megatron's --rotary-seq-len-interpolation-factor, by which positions are divided, computes the same."""
    return scaling is not None and scaling.get("rope_type") == "linear" and _is_number(scaling.get("factor"))


def _is_llama3_scaling(scaling: Mapping[str, object] | None) -> bool:
    """Whether Megatron's --use-rope-scaling computes the same; its three other numbers are fixed."""
    if scaling is None or scaling.get("rope_type") != "llama3" or not _is_number(scaling.get("factor")):
        return False
    return all(scaling.get(key) == value for key, value in _LLAMA3_ROPE.items())


def _need(args: Namespace, *names: str) -> object:
    for name in names:
        value = getattr(args, name, None)
        if value is not None:
            return value
    raise ConfigError(f"checkpoint args have no {' or '.join(map(repr, names))}; put the model's config.json beside it")


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _need_number(args: Namespace, name: str) -> float:
    value = _need(args, name)
    if _is_number(value):
        return float(value)
    raise ConfigError(f"checkpoint args say {name}={value!r}; it must be a number")


def _count(args: Namespace, name: str) -> int:
    value = getattr(args, name, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise FormatError(f"checkpoint args say {name}={value!r}; it must be a positive integer")
    return value
