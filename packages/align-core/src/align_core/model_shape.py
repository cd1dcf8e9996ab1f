"""The sizes of a model as its config.json says, for checks and estimates that need neither torch nor the weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align_core.errors import CheckpointError

_EXPERTS = ("num_local_experts", "num_experts")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """A Llama-like model; layouts and architectures are checked where the model is built."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    """Width of the gated MLP, or of each expert's."""
    vocab: int
    max_positions: int
    tied_embeddings: bool
    experts: int = 1
    """Experts a layer; 1 for a dense model."""
    experts_per_token: int = 1

    @property
    def expert_parameters(self) -> int:
        """Weights of one layer's experts, or of its MLP."""
        return self.experts * 3 * self.hidden * self.ffn

    @property
    def shared_parameters(self) -> int:
        """Weights of one layer that every token meets: attention, two norms, and a router if there are experts."""
        attention = 2 * self.hidden * (self.heads + self.kv_heads) * self.head_dim
        router = self.experts * self.hidden if self.experts > 1 else 0
        return attention + router + 2 * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer."""
        return self.shared_parameters + self.expert_parameters

    def parameters(self, *, head: str = "lm") -> int:
        """Weights of the whole model, under a language-model head or a score head."""
        output = self.hidden if head == "score" else 0 if self.tied_embeddings else self.vocab * self.hidden
        return self.vocab * self.hidden + self.layers * self.layer_parameters + self.hidden + output


def check_directory(directory: Path) -> None:
    """Raises CheckpointError unless the model directory is there."""
    if not directory.is_dir():
        raise CheckpointError(f"model directory {str(directory)!r} does not exist")


def read_model_config(directory: Path) -> dict[str, Any]:
    """`directory`/config.json, which Hugging Face and Megatron directories both have.

    Raises:
        CheckpointError: the directory or the file is not there, or it holds no JSON object.
    """
    check_directory(directory)
    path = directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"model directory {str(directory)!r} has no config.json") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{str(path)!r} is damaged: it must hold keys and values, found a {type(raw).__name__}")
    return raw


def read_model_shape(directory: Path) -> ModelShape:
    """The sizes in `directory`/config.json.

    Raises:
        CheckpointError: what `read_model_config` raises, or a size is missing.
    """
    raw, path = read_model_config(directory), directory / "config.json"
    experts = next((key for key in _EXPERTS if key in raw), None)
    width = "moe_intermediate_size" if experts is not None and "moe_intermediate_size" in raw else "intermediate_size"
    heads, hidden = _size(raw, "num_attention_heads", path), _size(raw, "hidden_size", path)
    return ModelShape(
        layers=_size(raw, "num_hidden_layers", path),
        hidden=hidden,
        heads=heads,
        kv_heads=_size(raw, "num_key_value_heads", path, default=heads),
        head_dim=_size(raw, "head_dim", path, default=hidden // heads),
        ffn=_size(raw, width, path),
        vocab=_size(raw, "vocab_size", path),
        max_positions=_size(raw, "max_position_embeddings", path, default=2048),
        tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
        experts=1 if experts is None else _size(raw, experts, path),
        experts_per_token=1 if experts is None else _size(raw, "num_experts_per_tok", path),
    )


def _size(raw: Mapping[str, Any], key: str, path: Path, *, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"{str(path)!r}: {key!r} is {value!r}; it must be a whole number above 0")
    return value
