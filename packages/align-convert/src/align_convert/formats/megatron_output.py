"""Plan a Megatron directory of the `torch` format to the byte: which file holds which part of which tensor, where."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from align_convert.arrays import Array, Held, Padding, dense, held_by
from align_convert.config import ModelConfig
from align_convert.errors import LayoutError
from align_convert.formats.megatron_args import args_from_config
from align_convert.formats.megatron_files import iteration_folder, model_keys, rank_file
from align_convert.formats.megatron_names import Naming, nested_legacy, spelled
from align_convert.formats.megatron_writer import extra_state, finish_megatron
from align_convert.formats.torch_zip import Stub, plan_archive
from align_convert.layout import Layout
from align_convert.output import Output, OutputFile
from align_convert.plan import Shard, rank_plan

ITERATION = 1  # Megatron takes 0 for "nothing to resume", and its loaders reject `release` here and there


def plan_megatron(
    config: ModelConfig, layout: Layout, *, dtype: torch.dtype, naming: Naming = "local", carry_from: Path | None = None
) -> Output:
    """Plan the directory of a layout.

    Raises:
        LayoutError: the model cannot be cut this way, or the naming has no words for it.
    """
    layout.check(config)
    if naming == "legacy" and config.num_experts is not None:
        raise LayoutError("legacy Megatron names have no experts like these; use naming local, te or te-grouped")
    targets: dict[str, list[Held]] = {name: [] for name in config.tensors()}
    paddings: list[Padding] = []
    files = []
    for rank in layout.files():
        chunks = [rank_plan(config, layout, replace(rank, vp=vp)) for vp in range(layout.vp)]
        stubs = [{shard.name: Stub(shard.shape, dtype) for shard in shards} for shards in chunks]
        state = _state(stubs, config=config, layout=layout, dtype=dtype, naming=naming)
        archive, order = plan_archive(state)
        path = rank_file(iteration_folder(Path(), ITERATION), layout, rank)
        files.append(OutputFile(path=path, size=archive.size, literals=archive.literals))
        places = {id(stub): offset for stub, offset in zip(order, archive.offsets, strict=True)}
        for shards, named in zip(chunks, stubs, strict=True):
            for shard in shards:
                array = dense(path, places[id(named[shard.name])], shard.shape, dtype)
                _enter(shard, array, targets, paddings)
    return Output(
        files=tuple(files),
        targets=targets,
        paddings=tuple(paddings),
        dtype=dtype,
        finish=lambda root: finish_megatron(
            root, config=config, layout=layout, dtype=dtype, iteration=ITERATION, carry_from=carry_from
        ),
    )


def _enter(shard: Shard, array: Array, targets: dict[str, list[Held]], paddings: list[Padding]) -> None:
    for piece in shard.pieces:
        targets[piece.hf_name].append(held_by(piece, array))
    if shard.padding is not None:
        paddings.append(Padding(shard.padding.hf_name, shard.padding.hf_row, array, shard.padding.rows))


def _state(
    chunks: list[dict[str, Stub]], *, config: ModelConfig, layout: Layout, dtype: torch.dtype, naming: Naming
) -> dict[str, object]:
    """The dictionary of a rank's file, its tensors yet to come."""
    state: dict[str, object] = {
        "args": args_from_config(config, layout, dtype=dtype, iteration=ITERATION, naming=naming),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
    }
    for key, tensors in zip(model_keys(layout), chunks, strict=True):
        if naming == "legacy":
            state[key] = nested_legacy(tensors, tied=config.tied_embeddings)
        else:
            state[key] = _flat(tensors, naming, has_experts=config.num_experts is not None)
    return state


def _flat(tensors: Mapping[str, Stub], naming: Naming, *, has_experts: bool) -> "OrderedDict[str, Stub | None]":
    """With the empty extra states that strict loaders ask for."""
    state: OrderedDict[str, Stub | None] = OrderedDict()
    for name, stub in tensors.items():
        state[spelled(name, naming, has_experts=has_experts)] = stub
        extra = extra_state(name)
        if extra is not None:
            state[spelled(extra, naming, has_experts=has_experts)] = None
    return state
