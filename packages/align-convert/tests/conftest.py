"""Tiny Llama models made on the spot: a config, random weights, a directory as transformers would write it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from align_convert import ModelConfig

RAW: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}

_MOE: dict[str, object] = {"num_experts_per_tok": 2, "head_dim": 8}
FAMILY_CHANGES: dict[str, dict[str, object]] = {
    "llama": {"architectures": ["LlamaForCausalLM"]},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 16},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16},
    "mixtral": {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, **_MOE},
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": 4,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        **_MOE,
    },
}
"""What makes the tiny model one of another family."""


def family_config(family: str, **changes: object) -> ModelConfig:
    """The tiny model of a family."""
    return ModelConfig.from_hf(RAW | {"model_type": family} | FAMILY_CHANGES[family] | changes)


@pytest.fixture
def make_family() -> Callable[..., ModelConfig]:
    """`make_family("qwen2", num_hidden_layers=2)` is the tiny model of a family."""
    return family_config


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    """`make_config(num_hidden_layers=2)` is the tiny config with some keys of config.json changed."""
    return lambda **changes: ModelConfig.from_hf(RAW | changes)


@pytest.fixture
def make_weights() -> Callable[..., dict[str, torch.Tensor]]:
    """`make_weights(config)` draws every tensor of the model from a fixed seed."""

    def make(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
            for name, shape in config.tensors().items()
        }

    return make


@pytest.fixture
def make_hf(tmp_path: Path, make_weights: Callable[..., dict[str, torch.Tensor]]) -> Callable[..., Path]:
    """`make_hf(config)` is a Hugging Face directory, written by the safetensors library and not by us."""

    def make(
        config: ModelConfig,
        name: str = "hf",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        extra: dict[str, torch.Tensor] | None = None,
        without: str | None = None,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir()
        weights = make_weights(config, seed=seed, dtype=dtype) | (extra or {})
        weights.pop(without or "", None)
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(dict(config.hf), indent=2), encoding="utf-8")
        (directory / "tokenizer.model").write_bytes(b"\x00tokens\xff")
        (directory / "generation_config.json").write_text('{"do_sample": true}', encoding="utf-8")
        (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        (directory / "notes.txt").write_text("not part of the model", encoding="utf-8")
        return directory

    return make
