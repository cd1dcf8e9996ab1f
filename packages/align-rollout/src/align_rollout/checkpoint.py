"""Reads what an engine must know of a Hugging Face model directory: sizes, end-of-sequence ids, names of the weights.

Reads JSON and safetensors headers only; knows nothing of vLLM and opens no tensor. Weights in pickle files are refused.
Source of the header layout: https://github.com/huggingface/safetensors (format section of its README).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from align_core.errors import CheckpointError, LayoutError
from align_core.types import ParamMeta

_DTYPES: Mapping[str, Literal["float32", "bfloat16", "float16"]] = {
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit; a larger number means that this is no safetensors file


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorLocation:
    """Where one weight lies on disk."""

    meta: ParamMeta
    file: Path
    offset: int
    """First byte in `file`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """A model directory, as an engine sees it."""

    path: Path
    vocab_size: int
    eos_ids: tuple[int, ...]
    """Ids that end a completion; empty when the model declares none."""
    max_positions: int | None
    """Longest sequence that the model was made for; None when it does not say, or scales its positions."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool
    """The output layer is the embedding; then no lm_head.weight exists."""
    params: tuple[ParamMeta, ...]
    """The weights of the checkpoint, in Hugging Face names."""

    def kv_bytes_per_token(self, *, item_bytes: int, tensor: int) -> int:
        """Bytes of keys and values that one token takes in one worker of a `tensor`-way engine."""
        return 2 * self.layers * max(1, self.kv_heads // tensor) * self.head_dim * item_bytes

    def check_tensor_parallel(self, tensor: int) -> None:
        """Raises LayoutError, listing what is possible, if `tensor` workers cannot share the attention heads."""
        possible = [ways for ways in range(1, self.heads + 1) if _divides(self, ways)]
        if tensor not in possible:
            raise LayoutError(
                f"tensor parallel size {tensor} does not divide {self.heads} attention heads and "
                f"{self.kv_heads} key-value heads of {str(self.path)!r}; use {', '.join(map(str, possible))}"
            )


def _divides(facts: ModelFacts, ways: int) -> bool:
    # Fewer key-value heads than workers are replicated, which needs the division to come out the other way round.
    return facts.heads % ways == 0 and (facts.kv_heads % ways == 0 or ways % facts.kv_heads == 0)


def read_model(path: Path) -> ModelFacts:
    """The facts of the model directory `path`; raises CheckpointError that says what is missing."""
    config = read_config(path)
    heads = _integer(config, "num_attention_heads", path)
    hidden = _integer(config, "hidden_size", path)
    tied = bool(config.get("tie_word_embeddings", False))
    return ModelFacts(
        path=path,
        vocab_size=_integer(config, "vocab_size", path),
        eos_ids=read_eos_ids(path, config),
        max_positions=_max_positions(config),
        layers=_integer(config, "num_hidden_layers", path),
        heads=heads,
        kv_heads=_integer({"num_key_value_heads": heads, **config}, "num_key_value_heads", path),
        head_dim=_integer({"head_dim": hidden // heads, **_present(config)}, "head_dim", path),
        tied=tied,
        params=tuple(tensor.meta for tensor in read_tensors(path) if _is_weight(tensor.meta.name, tied=tied)),
    )


def read_config(path: Path) -> dict[str, object]:
    """config.json of a model directory; raises CheckpointError if `path` is no such directory."""
    if not path.is_dir():
        raise CheckpointError(f"no model directory at {str(path)!r}; give a Hugging Face directory with config.json")
    return _read_object(path / "config.json")


def read_eos_ids(path: Path, config: Mapping[str, object]) -> tuple[int, ...]:
    """The end-of-sequence ids, sorted: generation_config.json's, where it names any, else config.json's."""
    generation = path / "generation_config.json"
    sources = [_read_object(generation)] if generation.is_file() else []
    for source in (*sources, config):
        found = source.get("eos_token_id")
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found:
            return tuple(sorted(int(token) for token in found))
    return ()


def read_tensors(path: Path) -> list[TensorLocation]:
    """Every floating-point tensor in the safetensors files of `path`, by name."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{str(path)!r} has no *.safetensors file; save the model again with save_pretrained "
            "(weights in pickle files are not read, they can run code)"
        )
    return sorted((tensor for file in files for tensor in _read_header(file)), key=lambda tensor: tensor.meta.name)


def _read_header(file: Path) -> list[TensorLocation]:
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size <= _MAX_HEADER_BYTES:
            raise CheckpointError(f"{str(file)!r} is not a safetensors file: its header claims {size} bytes")
        text = stream.read(size)
    try:
        header = json.loads(text)
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is not a safetensors file: its header is not JSON ({error})") from error
    return [
        TensorLocation(
            meta=ParamMeta(name=name, shape=tuple(entry["shape"]), dtype=_DTYPES[entry["dtype"]]),
            file=file,
            offset=8 + size + int(entry["data_offsets"][0]),
        )
        for name, entry in header.items()
        if name != "__metadata__" and entry["dtype"] in _DTYPES
    ]


def _read_object(file: Path) -> dict[str, object]:
    if not file.is_file():
        raise CheckpointError(f"{str(file.parent)!r} has no {file.name}; give a Hugging Face model directory")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{str(file)!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{str(file)!r} must hold a JSON object, found {type(found).__name__}")
    return found


def _present(config: Mapping[str, object]) -> dict[str, object]:
    """`config` without its nulls (head_dim is null in some Llama configs)."""
    return {key: value for key, value in config.items() if value is not None}


def _integer(config: Mapping[str, object], key: str, path: Path) -> int:
    value = config.get(key)
    if not isinstance(value, int):
        raise CheckpointError(f"config.json of {str(path)!r} has {key}={value!r}; a whole number is needed")
    return value


def _max_positions(config: Mapping[str, object]) -> int | None:
    # Linear, dynamic and YaRN scaling lengthen the context by rules of their own, which vLLM applies and checks.
    scaling = config.get("rope_scaling") or config.get("rope_parameters")
    kind = (scaling.get("rope_type") or scaling.get("type")) if isinstance(scaling, dict) else None
    positions = config.get("max_position_embeddings")
    return positions if isinstance(positions, int) and kind in (None, "default", "llama3") else None


def _is_weight(name: str, *, tied: bool) -> bool:
    """False for what engines do not load: rotary tables of old checkpoints, the second copy of a tied embedding."""
    return not name.endswith("rotary_emb.inv_freq") and not (tied and name == "lm_head.weight")
