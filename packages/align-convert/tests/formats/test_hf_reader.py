"""Reading Hugging Face directories: slices, shards, and every way an index can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from align_convert import FormatError, HfReader, ModelConfig, PlanError

Make = Callable[..., ModelConfig]
MakeHf = Callable[..., Path]


def _sharded(directory: Path) -> dict[str, object]:
    """Cut model.safetensors into two files under an index, which is returned for spoiling."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[:30], names[30:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    _write_index(directory, weight_map)
    return dict(weight_map)


def _write_index(directory: Path, weight_map: object) -> None:
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def test_slices_and_kinds_of_a_single_file(make_config: Make, make_hf: MakeHf) -> None:
    directory = make_hf(make_config(), dtype=torch.bfloat16)
    reader = HfReader(directory)
    whole = load_file(directory / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    assert reader.tensors()[name] == ((32, 48), torch.bfloat16)
    assert torch.equal(reader.read(name, ((3, 9), (8, 40))), whole[name][3:9, 8:40])
    assert torch.equal(reader.read("model.norm.weight"), whole["model.norm.weight"])


def test_shards_are_read_through_the_index(make_config: Make, make_hf: MakeHf) -> None:
    directory = make_hf(make_config())
    whole = load_file(directory / "model.safetensors")
    _sharded(directory)
    reader = HfReader(directory)
    reader.check()
    assert all(torch.equal(reader.read(name), value) for name, value in whole.items())


def test_index_that_is_wrong_is_refused(make_config: Make, make_hf: MakeHf) -> None:
    directory = make_hf(make_config())
    weight_map = _sharded(directory)
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    wrong: list[tuple[object, str]] = [
        ({**weight_map, "lm_head.weight": "../other.safetensors"}, "which is not a plain file name"),
        ({**weight_map, "lm_head.weight": 3}, "which is not a plain file name"),
        ({**weight_map, "lm_head.weight": "model-3.safetensors"}, "lacks 1 file(s) that its index names: 'model-3"),
        ({**weight_map, "model.norm.weight": first}, "disagree about 1 tensor: 'model.norm.weight'"),
        ({k: v for k, v in weight_map.items() if k != "model.norm.weight"}, f"{second!r} disagree about 1 tensor"),
        ({}, "has no 'weight_map'"),
        ([], "has no 'weight_map'"),
    ]
    for changed, message in wrong:
        _write_index(directory, changed)
        with pytest.raises(FormatError) as caught:
            HfReader(directory)
        assert message in str(caught.value)
    (directory / "model.safetensors.index.json").write_text("{", encoding="utf-8")
    with pytest.raises(FormatError, match="cannot be read as JSON"):
        HfReader(directory)


def test_truncated_or_missing_weights_are_named(make_config: Make, make_hf: MakeHf) -> None:
    directory = make_hf(make_config())
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FormatError, match=r"model\.safetensors' is not a whole safetensors file"):
        HfReader(directory)
    file.unlink()
    with pytest.raises(FormatError, match=r"has neither 'model.safetensors' nor 'model.safetensors.index.json'"):
        HfReader(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FormatError, match=r"pytorch_model.bin' is not a whole torch.save file"):
        HfReader(directory)


def test_unknown_tensor_or_index_is_refused(make_config: Make, make_hf: MakeHf) -> None:
    reader = HfReader(make_hf(make_config()))
    with pytest.raises(FormatError, match="has no tensor 'nope'"):
        reader.read("nope")
    for index in (((0, 33),), ((-1, 3),), ((5, 4),), ((0, 1), (0, 1))):
        with pytest.raises(PlanError, match=r"does not fit tensor 'model.norm.weight'"):
            reader.read("model.norm.weight", index)
