"""What an engine reads of a model directory, and how it refuses one that it cannot serve."""

import json
from pathlib import Path

import pytest

from align_core.config import EngineConfig
from align_core.errors import CheckpointError, ConfigError, LayoutError
from align_rollout.checkpoint import read_model
from align_rollout.vllm import VllmEngine

_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
}


def _model(path: Path, **changes: object) -> Path:
    (path / "config.json").write_text(json.dumps({**_CONFIG, **changes}))
    (path / "model.safetensors").touch()
    return path


def test_sizes_and_default_head_dim(tmp_path: Path) -> None:
    """hidden 96 / 6 heads = 16; keys and values of 2 layers x 3 heads x 16 x 4 bytes: 768 a token, 256 on 3 ways."""
    facts = read_model(_model(tmp_path, head_dim=None))
    assert (facts.vocab_size, facts.head_dim, facts.kv_heads, facts.has_weights) == (100, 16, 3, True)
    assert facts.kv_bytes_per_token(item_bytes=4, tensor=1) == 768
    assert facts.kv_bytes_per_token(item_bytes=4, tensor=3) == 256


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(2, None, (2,)), ([3, 2], None, (2, 3)), (2, [128, 5], (5, 128)), (2, None, (2,)), (None, None, ())],
)
def test_eos_ids_come_from_generation_config_first(
    tmp_path: Path, config: object, generation: object, expected: tuple[int, ...]
) -> None:
    _model(tmp_path, eos_token_id=config)
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert read_model(tmp_path).eos_ids == expected


def test_generation_config_without_eos_leaves_it_to_config(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert read_model(tmp_path).eos_ids == (2,)


def test_directory_without_safetensors_has_no_weights(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert not read_model(tmp_path).has_weights


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    _model(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickle files, which can run code"):
        read_model(tmp_path)


def test_unknown_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model directory at '.*absent'"):
        VllmEngine.from_model(tmp_path / "absent", EngineConfig())


def test_directory_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        read_model(tmp_path)


def test_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json' is not valid JSON"):
        read_model(tmp_path)


def test_config_without_a_size_names_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has vocab_size='many'; a whole number is needed"):
        read_model(_model(tmp_path, vocab_size="many"))


def test_reward_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"LlamaForSequenceClassification.*an engine needs a language model"):
        read_model(_model(tmp_path, architectures=["LlamaForSequenceClassification"]))


def test_tensor_parallel_that_does_not_divide_lists_what_does(tmp_path: Path) -> None:
    """6 heads and 3 key-value heads: 1 and 3 cut both, 6 replicates key-value heads; 2 divides neither way."""
    with pytest.raises(LayoutError, match=r"tensor 2 does not divide 6 attention .* 3 key-value heads.*; use 1, 3, 6"):
        VllmEngine.from_model(_model(tmp_path), EngineConfig(tensor=2, context=64))


def test_context_beyond_the_models_positions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.context 65 is longer than the 64 positions"):
        VllmEngine.from_model(_model(tmp_path), EngineConfig(context=65))


def test_scaled_positions_are_left_to_vllm(tmp_path: Path) -> None:
    assert read_model(_model(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})).max_positions is None
