"""Qwen2.5-Coder-0.5B-Instruct as a Hugging Face directory in bfloat16, from its GGUF file (Q4_K_M, 491 MB).

    python benchmarks/qwen_from_gguf.py qwen.gguf OUT

Reads the file directly (no transformers), so it takes seconds. The tokenizer is rebuilt from the file's metadata.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

from align_core.atomic import new_directory
from align_core.tutorial.smollm2 import hf_name, tokenizer_json

# Qwen2's pre-tokenizer: contractions, words, single digits, punctuation, white space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}


def main() -> None:
    """Converts one file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    reader = GGUFReader(options.source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "qwen2":
        raise SystemExit(f"{options.source} is of architecture {fields['general.architecture']!r}, not 'qwen2'")
    with new_directory(options.out) as staging:
        config = qwen_config(fields)
        _write(staging / "config.json", config)
        _write(staging / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
        weights = {
            _name(tensor.name): torch.from_numpy(
                np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            ).to(torch.bfloat16)
            for tensor in reader.tensors
        }
        # The model ties both matrices; the file holds two roundings of the same one, the output's the finer.
        if "lm_head.weight" in weights:
            weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
        save_file(weights, staging / "model.safetensors", metadata={"format": "pt"})
        _write(staging / "tokenizer.json", qwen_tokenizer(fields))
        _write(staging / "tokenizer_config.json", tokenizer_config(fields))


def qwen_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's config.json from GGUF metadata."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["qwen2.embedding_length"],
        "intermediate_size": fields["qwen2.feed_forward_length"],
        "num_hidden_layers": fields["qwen2.block_count"],
        "num_attention_heads": fields["qwen2.attention.head_count"],
        "num_key_value_heads": fields["qwen2.attention.head_count_kv"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["qwen2.context_length"],
        "rms_norm_eps": float(f"{fields['qwen2.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(f"{fields['qwen2.rope.freq_base']:.7g}"),
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "torch_dtype": "bfloat16",
    }


def qwen_tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """Byte-level BPE with Qwen2's splitting rule."""
    tokenizer = tokenizer_json(fields)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    tokenizer["normalizer"] = {"type": "NFC"}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    tokenizer["decoder"] = byte_level
    return tokenizer


def tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    """Special tokens and chat template; no token is put in front of a text."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "pad_token": tokens[fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.bos_token_id"])],
        "model_max_length": fields["qwen2.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


def _name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor, the biases of Qwen2 included."""
    layer, _, inside = name.removeprefix("blk.").partition(".")
    return f"model.layers.{layer}.{_BIASES[inside]}" if inside in _BIASES else hf_name(name)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
