"""Reads what an engine must know of a model before it starts: sizes, end-of-sequence ids, whether weights are there.

A model directory is anything with a Hugging Face config.json: a Hugging Face model, or a Megatron checkpoint of ours,
whose weights an engine cannot read but can be sent. Reads JSON only, and knows nothing of vLLM.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from align_core.errors import CheckpointError, LayoutError
from align_core.stop_ids import read_eos_ids, read_object


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
    has_weights: bool
    """False for a directory that describes a model and leaves its weights to the first weight update."""

    def kv_bytes_per_token(self, *, item_bytes: int, tensor: int) -> int:
        """Bytes of keys and values that one token takes in one worker of a `tensor`-way engine."""
        return 2 * self.layers * max(1, self.kv_heads // tensor) * self.head_dim * item_bytes

    def check_tensor_parallel(self, tensor: int) -> None:
        """Raises LayoutError, listing what is possible, if `tensor` workers cannot share the attention heads."""
        possible = [ways for ways in range(1, self.heads + 1) if _divides(self, ways)]
        if tensor not in possible:
            raise LayoutError(
                f"engine.tensor {tensor} does not divide {self.heads} attention heads and "
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
    architectures = config.get("architectures")
    if isinstance(architectures, list) and not any(str(name).endswith("ForCausalLM") for name in architectures):
        raise CheckpointError(
            f"{str(path)!r} holds a {architectures}; an engine needs a language model (...ForCausalLM)"
        )
    return ModelFacts(
        path=path,
        vocab_size=_integer(config, "vocab_size", path),
        eos_ids=read_eos_ids(path),
        max_positions=_max_positions(config),
        layers=_integer(config, "num_hidden_layers", path),
        heads=heads,
        kv_heads=_integer({"num_key_value_heads": heads, **config}, "num_key_value_heads", path),
        head_dim=_integer({"head_dim": hidden // heads, **_present(config)}, "head_dim", path),
        has_weights=_holds_weights(path),
    )


def read_config(path: Path) -> dict[str, object]:
    """config.json of a model directory; raises CheckpointError if `path` is no such directory."""
    if not path.is_dir():
        raise CheckpointError(f"no model directory at {str(path)!r}; give a Hugging Face directory with config.json")
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{str(path)!r} has no {file.name}; give a Hugging Face model directory")
    return read_object(file)


def _holds_weights(path: Path) -> bool:
    if any(path.glob("*.safetensors")):
        return True
    if any(path.glob("pytorch_model*.bin")):
        raise CheckpointError(
            f"{str(path)!r} holds its weights in pickle files, which can run code and are not read; "
            "save the model again with save_pretrained"
        )
    return False


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
