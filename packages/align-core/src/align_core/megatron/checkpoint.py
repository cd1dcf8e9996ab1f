"""Saves and continues training: megatron-core's torch_dist files with a small JSON beside them, all or nothing.

A checkpoint can be loaded under another parallel layout. The files are written by torch's own writer in this process:
megatron-core's forks writers, which a process with threads (Ray's workers, CUDA) may not survive. Only checkpoints of
one's own runs are to be loaded: torch_dist metadata is a pickle.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from align_convert.config import ModelConfig
from align_core.atomic import replace_directory, write_json
from align_core.errors import CheckpointError
from align_core.megatron.model import LlamaModel
from align_core.megatron.optimizer import Optimization
from align_core.megatron.parallel import RankContext
from align_core.megatron.quiet import quiet_megatron

_RECORD = "align.json"
_FORMAT = 1


class _InProcessWriter(SaveShardedStrategy):  # type: ignore[misc]
    """The torch_dist format, written by threads of this process."""

    def __init__(self) -> None:
        super().__init__("torch_dist", 1)

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Write this rank's shards."""
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_save(
            mcore_to_pyt_state_dict(renamed, False),
            storage_writer=FileSystemWriter(checkpoint_dir),
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Random states travel in the same files."""
        return True


@contextlib.contextmanager
def shared_directory(path: Path, context: RankContext) -> Iterator[Path]:
    """A hidden sibling of `path` that all ranks fill; when all are done, rank 0 gives it its name."""
    partial = path.with_name(f".{path.name}.partial")
    if context.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    yield partial
    dist.barrier()
    if context.rank == 0:
        replace_directory(partial, path)
    dist.barrier()


def save_checkpoint(
    path: Path,
    *,
    chunks: Sequence[LlamaModel],
    optimization: Optimization,
    config: ModelConfig,
    context: RankContext,
    state: Mapping[str, str],
) -> None:
    """Write weights, optimizer, schedule, random state and `state`; every rank calls it."""
    with shared_directory(path, context) as partial:
        content = _content(chunks, optimization if optimization.steps_done else None, is_loading=False)
        content["rng"] = _random_state(context)
        content["scheduler"] = optimization.scheduler.state_dict()
        with quiet_megatron():
            dist_checkpointing.save(content, str(partial), sharded_strategy=_InProcessWriter())
        if context.rank == 0:
            record = {
                "format": _FORMAT,
                "step": optimization.steps_done,
                "parallel": _layout(context),
                "state": dict(state),
                "tensors": _shapes(config),
            }
            write_json(partial / _RECORD, record)


def load_checkpoint(
    path: Path, *, chunks: Sequence[LlamaModel], optimization: Optimization, config: ModelConfig, context: RankContext
) -> dict[str, str]:
    """Continue from `save_checkpoint`; every rank calls it; returns the saved `state`.

    Raises:
        CheckpointError: nothing there, incomplete, or another model's.
    """
    record = read_record(path)
    _check_model(path, record["tensors"], config)
    # AdamW has no state before its first step, so there is none to ask for.
    content = _content(chunks, optimization if record["step"] else None, is_loading=True)
    same_layout = record["parallel"] == _layout(context)
    if same_layout:
        content["rng"] = _random_state(context)
    try:
        with quiet_megatron():
            loaded = dist_checkpointing.load(content, str(path))
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} cannot be read: {error}") from error
    for chunk, key in zip(chunks, _keys(chunks)):
        chunk.load_state_dict(loaded[key])
    optimization.restore(loaded.get("optimizer"), loaded["scheduler"])
    if same_layout:
        _restore_random_state(loaded["rng"])
    return dict(record["state"])


def read_record(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint; CheckpointError if it is not there."""
    try:
        record = json.loads((path / _RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{str(path)!r} is not a checkpoint of a training run: it has no {_RECORD}") from None
    except ValueError as error:
        raise CheckpointError(f"{str(path / _RECORD)!r} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        found = record.get("format") if isinstance(record, dict) else None
        raise CheckpointError(f"{str(path / _RECORD)!r} is of format {found}; this version reads {_FORMAT}")
    return record


def _content(chunks: Sequence[LlamaModel], optimization: Optimization | None, *, is_loading: bool) -> dict[str, Any]:
    """The tensors of a checkpoint; when loading, the places that they go to."""
    content = {key: chunk.sharded_state_dict() for chunk, key in zip(chunks, _keys(chunks))}
    if optimization is None:
        return content
    # The optimizer replaces entries of the mapping that it is given.
    weights = {key: dict(part) for key, part in content.items()} if len(chunks) > 1 else dict(content["model"])
    return {**content, "optimizer": optimization.optimizer.sharded_state_dict(weights, is_loading=is_loading)}


def _keys(chunks: Sequence[LlamaModel]) -> list[str]:
    """megatron-core's names for the chunks of a rank."""
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _shapes(config: ModelConfig) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in config.tensors().items()}


def _check_model(path: Path, saved: Mapping[str, list[int]], config: ModelConfig) -> None:
    """Refuse a checkpoint whose tensors are not this model's."""
    wanted = _shapes(config)
    for name in sorted(saved.keys() | wanted.keys()):
        if saved.get(name) != wanted.get(name):
            raise CheckpointError(
                f"{str(path)!r} is a checkpoint of another model: {name!r} has shape {saved.get(name)} there and "
                f"{wanted.get(name)} here"
            )


def _layout(context: RankContext) -> dict[str, int]:
    parallel = context.parallel
    return {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual": parallel.virtual,
        "context": parallel.context,
        "data": parallel.data,
    }


def _random_state(context: RankContext) -> ShardedObject:
    """This rank's generators, one object a (pipeline, tensor, data) position."""
    parallel = context.parallel
    states = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if context.device.type == "cuda" else None,
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    shape = (parallel.pipeline, parallel.tensor, parallel.data)
    return ShardedObject("rng", states, shape, (context.pipeline, context.tensor, context.data))


def _restore_random_state(states: Mapping[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    get_cuda_rng_tracker().set_states(states["tracker"])
