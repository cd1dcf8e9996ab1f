"""What is written is what the safetensors library reads, with an index in bytes; nothing is left out silently."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from align_convert import FormatError, HfReader, ModelConfig, PlanError, write_hf

Make = Callable[..., ModelConfig]
MakeWeights = Callable[..., dict[str, torch.Tensor]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_file_in_any_order(
    make_config: Make, make_weights: MakeWeights, tmp_path: Path, dtype: torch.dtype
) -> None:
    config = make_config(num_hidden_layers=2)
    weights = make_weights(config, dtype=dtype)
    write_hf(tmp_path / "out", config, reversed(weights.items()), dtype=dtype)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) and found[name].dtype == dtype for name in weights)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_shards_keep_to_their_size_and_the_index_counts_bytes(
    make_config: Make, make_weights: MakeWeights, tmp_path: Path
) -> None:
    """Bytes: embedding + attention 18688 | MLP + norms 18688 | attention + gate 18432 | up, down, norms, head 19072."""
    config = make_config(num_hidden_layers=2)
    weights = make_weights(config)
    write_hf(tmp_path / "out", config, weights.items(), dtype=torch.float32, max_shard_size=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in weights.values())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-00004.safetensors" for n in range(1, 5)]
    for file in files:
        held = load_file(file)
        assert sum(value.numel() * 4 for value in held.values()) <= 20_000
        assert sorted(held) == sorted(name for name, owner in index["weight_map"].items() if owner == file.name)
    HfReader(tmp_path / "out").check()


def test_tensor_larger_than_a_shard_gets_its_own_file(
    make_config: Make, make_weights: MakeWeights, tmp_path: Path
) -> None:
    config = make_config(num_hidden_layers=1)
    weights = make_weights(config)
    write_hf(tmp_path / "out", config, weights.items(), dtype=torch.float32, max_shard_size=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(weights)


def test_wrong_set_of_tensors_writes_nothing(make_config: Make, make_weights: MakeWeights, tmp_path: Path) -> None:
    config = make_config(num_hidden_layers=1)
    items = list(make_weights(config).items())
    wrong: list[tuple[list[tuple[str, torch.Tensor]], str]] = [
        (items[1:], "1 of 12 tensors were not given, first 'model.embed_tokens.weight'"),
        ([*items, items[0]], "'model.embed_tokens.weight' is given twice"),
        ([("x", items[0][1])], "tensor 'x' is not one of the 12 planned"),
        ([(items[0][0], torch.ones(2))], "has shape (2,); the plan says (50, 32)"),
    ]
    for tensors, message in wrong:
        with pytest.raises(PlanError) as caught:
            write_hf(tmp_path / "out", config, tensors, dtype=torch.float32)
        assert message in str(caught.value)
        assert list(tmp_path.iterdir()) == []


def test_type_that_is_no_weight_type_is_refused(make_config: Make, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"cannot be written as torch.int8; use float32, float16 or bfloat16"):
        write_hf(tmp_path / "out", make_config(), [], dtype=torch.int8)


def test_new_spelling_of_the_type_is_kept(make_config: Make, make_weights: MakeWeights, tmp_path: Path) -> None:
    raw = {key: value for key, value in make_config(num_hidden_layers=1).hf.items() if key != "torch_dtype"}
    config = ModelConfig.from_hf(raw | {"dtype": "float32"})
    write_hf(tmp_path / "out", config, make_weights(config).items(), dtype=torch.float16)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == raw | {"dtype": "float16"}
