"""Keys of megatron-core's `torch_dist` checkpoints: layers, and experts, stacked along leading axes of one tensor.

    root/latest_checkpointed_iteration.txt
    root/iter_0000001/{metadata.json, common.pt, .metadata, __0_0.distcp, ...}

They say nothing of tensor or pipeline parallelism: one checkpoint serves every layout.
Source: GPTModel.sharded_state_dict of megatron-core 0.16.1, saved and listed.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from align_convert.config import ModelConfig
from align_convert.formats.megatron_names import spelled

METADATA = ".metadata"
COMMON = "common.pt"
BACKEND = "metadata.json"

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


class Stacked(NamedTuple):
    """Where a tensor of the model lies in the checkpoint."""

    key: str
    at: tuple[int, ...]
    """Along the leading axes: (), (layer,) or (layer, expert)."""
    stack: tuple[int, ...]
    """Sizes of those axes."""


class Item(NamedTuple):
    """One tensor of one layer, or an object, in a file."""

    place: Stacked
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


def stacked(name: str, config: ModelConfig) -> Stacked:
    """The place of a tensor with a local-spec name, its layers and experts counted over the whole model."""
    match = _LAYER.fullmatch(name)
    if match is None:
        return Stacked(name, (), ())
    layer, rest = int(match[1]), match[2]
    expert = _EXPERT.fullmatch(rest)
    if expert is not None:
        key = f"decoder.layers.mlp.experts.experts.{expert[2]}"
        return Stacked(key, (layer, int(expert[1])), (config.num_layers, config.num_experts or 0))
    te = spelled(f"decoder.layers.{rest}", "te", has_experts=config.num_experts is not None)
    return Stacked(te, (layer,), (config.num_layers,))


def apart(place: Stacked) -> Stacked:
    """The same tensor where each layer has a key of its own, as Megatron saves models whose layers differ."""
    key = place.key.replace("decoder.layers.", f"decoder.layers.{place.at[0]}.", 1)
    return Stacked(key, place.at[1:], place.stack[1:])


def aliases(key: str) -> tuple[str, ...]:
    """Other keys under which Megatron looks for the same tensor.

    The local spec's norm before experts is saved as if it were fused into a dense MLP.
    """
    if key == "decoder.layers.pre_mlp_layernorm.weight":
        return ("decoder.layers.mlp.linear_fc1.layer_norm_weight",)
    return ()


def extra_states(keys: "dict[str, tuple[int, ...]]") -> Iterator[str]:
    """Names of the empty objects that strict loading asks for beside the linear layers.

    Args:
        keys: key of each weight -> sizes of its leading axes.
    """
    for key, stack in keys.items():
        module = key.removesuffix(".weight")
        if not key.endswith(".weight") or not (".linear_" in module or module == "output_layer"):
            continue
        yield from _shards(module, stack)
        if module.endswith("self_attention.linear_qkv"):
            yield from _shards(module.replace("linear_qkv", "core_attention"), stack)  # Transformer Engine's


def _shards(module: str, stack: tuple[int, ...]) -> Iterator[str]:
    sizes = stack or (1,)
    total = 1
    for size in sizes:
        total *= size
    for flat in range(total):
        index, rest = [], flat
        for size in reversed(sizes):
            index.append(rest % size)
            rest //= size
        where = ".".join(map(str, reversed(index)))
        yield f"{module}._extra_state/shard_{where}_{'.'.join(map(str, sizes))}"


def is_dist_folder(path: Path) -> bool:
    """Whether `path` is one iteration of such a checkpoint."""
    return (path / METADATA).is_file()
