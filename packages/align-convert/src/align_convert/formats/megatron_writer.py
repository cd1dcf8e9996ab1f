"""Write a Megatron directory of the `torch` format, one rank's file at a time.

Used by the converter, and by training to export: each process writes its own rank with `write_megatron_rank`, then
one of them calls `finish_megatron`, whose tracker file makes the checkpoint visible.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from align_convert.atomic import TRACKER, new_file
from align_convert.carried import write_description
from align_convert.config import ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES
from align_convert.errors import FormatError, PlanError
from align_convert.formats.megatron_args import args_from_config
from align_convert.formats.megatron_files import iteration_folder, model_keys, rank_file
from align_convert.layout import Layout, Rank
from align_convert.plan import rank_plan


def write_megatron_rank(
    directory: str | Path,
    *,
    config: ModelConfig,
    layout: Layout,
    rank: Rank,
    chunks: Sequence[Mapping[str, torch.Tensor]],
    dtype: torch.dtype,
    iteration: int = 1,
) -> Path:
    """Write the file of one (tensor, pipeline, expert) rank.

    Args:
        directory: the checkpoint's root; other ranks may be writing there at the same time.
        rank: its `vp` is not looked at: a file holds all chunks of a stage.
        chunks: one mapping a virtual pipeline chunk, local megatron-core name -> tensor; `_extra_state` is dropped.
        dtype: what the weights are cast to.
        iteration: at least 1; Megatron takes 0 for "nothing to resume".
    Returns:
        The file.
    Raises:
        PlanError: names or shapes are not those of the plan.
    """
    if len(chunks) != layout.vp:
        raise PlanError(f"{len(chunks)} model chunks are given; virtual pipeline size {layout.vp} needs {layout.vp}")
    if dtype not in SAFETENSORS_NAMES:
        raise FormatError(f"weights cannot be written as {dtype}; use float32, float16 or bfloat16")
    state: dict[str, object] = {
        "args": args_from_config(config, layout, dtype=dtype, iteration=iteration),
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "num_floating_point_operations_so_far": 0,
    }
    for chunk, (key, tensors) in enumerate(zip(model_keys(layout), chunks, strict=True)):
        where = replace(rank, vp=chunk)
        state[key] = _model_state(tensors, config=config, layout=layout, rank=where, dtype=dtype)
    path = rank_file(iteration_folder(Path(directory), iteration), layout, rank)
    with new_file(path) as file:
        torch.save(state, file)
    return path


def finish_megatron(
    directory: str | Path,
    *,
    config: ModelConfig,
    layout: Layout,
    dtype: torch.dtype,
    iteration: int = 1,
    carry_from: str | Path | None = None,
) -> None:
    """Complete a directory once every rank's file is there: config and carried files, then the tracker.

    Raises:
        FormatError: a rank's file is missing.
    """
    root = Path(directory)
    folder = iteration_folder(root, iteration)
    for rank in layout.files():
        file = rank_file(folder, layout, rank)
        if not file.is_file():
            raise FormatError(f"{str(file)!r} is missing; every rank writes its file before finish_megatron")
    write_description(root, config, dtype=dtype, carry_from=None if carry_from is None else Path(carry_from))
    with new_file(root / TRACKER) as tracker:
        tracker.write(str(iteration).encode("ascii"))


def _model_state(
    tensors: Mapping[str, torch.Tensor], *, config: ModelConfig, layout: Layout, rank: Rank, dtype: torch.dtype
) -> "OrderedDict[str, torch.Tensor | None]":
    """One chunk in the plan's order, its shapes checked, with the empty extra states that strict loaders ask for."""
    plan = {shard.name: shard.shape for shard in rank_plan(config, layout, rank)}
    given = {name for name in tensors if not name.endswith("_extra_state")}
    odd = sorted(given ^ set(plan))
    if odd:
        side = "has no place in" if odd[0] in given else "is missing for"
        raise PlanError(f"tensor {odd[0]!r} {side} the plan of {rank} ({len(odd)} such)")
    state: OrderedDict[str, torch.Tensor | None] = OrderedDict()
    for name, shape in plan.items():
        if tuple(tensors[name].shape) != shape:
            raise PlanError(f"tensor {name!r} has shape {tuple(tensors[name].shape)}; the plan of {rank} says {shape}")
        state[name] = _own_storage(tensors[name], dtype)
        extra = extra_state(name)
        if extra is not None:
            state[extra] = None
    return state


def extra_state(name: str) -> str | None:
    """The `_extra_state` entry that goes with a weight, if one does."""
    module = name.removesuffix(".weight")
    is_linear = module.rsplit(".", 1)[-1].startswith("linear_") or module == "output_layer"
    return f"{module}._extra_state" if is_linear and name.endswith(".weight") else None


def _own_storage(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """On the CPU, and alone in its storage: torch.save of a view would write the whole buffer it looks into."""
    value = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    return value.clone() if value.untyped_storage().nbytes() != value.numel() * value.itemsize else value
