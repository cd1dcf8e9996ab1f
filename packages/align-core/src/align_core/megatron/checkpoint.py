"""Saves and continues training: megatron-core's torch_dist files with a small JSON beside them, all or nothing.

A checkpoint can be loaded under another parallel layout. The files are written by torch's own writer in this process:
megatron-core's forks writers, which a process with threads (Ray's workers, CUDA) may not survive. Only checkpoints of
one's own runs are to be loaded: torch_dist metadata is a pickle.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as torch_load
from torch.distributed.checkpoint.state_dict_saver import save as torch_save

from align_convert.config import ModelConfig
from align_core.atomic import replace_directory, write_json
from align_core.errors import CheckpointError, choices
from align_core.megatron.model import LlamaModel
from align_core.megatron.optimizer import Optimization
from align_core.megatron.parallel import RankContext
from align_core.megatron.quiet import quiet_megatron
from align_core.megatron.random_state import random_state, restore_random_state
from align_core.megatron.shards import OwnedRange, Rectangles, sharded_state

_RECORD = "align.json"
_FORMAT = 2
_EXTRA = "_extra_state"  # scales of fp8, which is not used


class _Collecting(SaveShardedStrategy):  # type: ignore[misc]
    """Takes what megatron-core would write, in the torch_dist format, and keeps it to be written later."""

    def __init__(self, more: Mapping[str, Rectangles], *, copy: bool) -> None:
        super().__init__("torch_dist", 1)
        self._more, self._copy = more, copy
        self.collected: dict[str, Any] = {}

    def save(self, sharded_state_dict: Any, checkpoint_dir: str | Path) -> None:
        """Take this rank's shards; copied to the host if training goes on before they are written."""
        del checkpoint_dir
        renamed, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        if self._copy:
            for shard in (shard for shards in renamed.values() for shard in shards if isinstance(shard, ShardedTensor)):
                shard.data = shard.data.detach().to("cpu", copy=True)
        more = {key: part.copied_to_host() if self._copy else part for key, part in self._more.items()}
        self.collected = {**mcore_to_pyt_state_dict(renamed, False), **more}

    @property
    def can_handle_sharded_objects(self) -> bool:
        """Random states travel in the same files."""
        return True


@contextlib.contextmanager
def shared_directory(path: Path, context: RankContext) -> Iterator[Path]:
    """A hidden sibling of `path` that all ranks fill; when all are done, rank 0 gives it its name."""
    partial = _begin(path, context)
    yield partial
    _commit(partial, path, context, None)


def _begin(path: Path, context: RankContext) -> Path:
    partial = path.with_name(f".{path.name}.partial")
    if context.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    return partial


def _commit(partial: Path, path: Path, context: RankContext, group: dist.ProcessGroup | None) -> None:
    dist.barrier(group=group)
    if context.rank == 0:
        replace_directory(partial, path)
    dist.barrier(group=group)


def begin_checkpoint(
    path: Path,
    *,
    chunks: Sequence[LlamaModel],
    optimization: Optimization,
    config: ModelConfig,
    lora_rank: int,
    context: RankContext,
    state: Mapping[str, str],
    group: dist.ProcessGroup | None,
) -> Callable[[], None]:
    """Gather weights, optimizer, schedule, random state and `state`; the result writes them. Every rank calls both.

    Args:
        group: over which ranks agree while writing. With one of its own, the result may run in another thread while
            training goes on, because everything is copied; without one, it is to be called at once.
    """
    partial = _begin(path, context)
    content: dict[str, Any] = _weights(chunks)
    state_of = sharded_state(_owned(optimization), _flat(content), vocab_size=config.vocab_size)
    content["rng"] = random_state(context)
    content["scheduler"] = optimization.scheduler.state_dict()
    collecting = _Collecting(state_of, copy=group is not None)
    with quiet_megatron():
        dist_checkpointing.save(content, str(partial), sharded_strategy=collecting)
    record = {
        "format": _FORMAT,
        "step": optimization.steps_done,
        "adam_steps": optimization.adam_steps,
        "parallel": _layout(context),
        "state": dict(state),
        "tensors": _shapes(config),
        "lora_rank": lora_rank,
    }

    def write() -> None:
        with quiet_megatron():
            torch_save(
                collecting.collected,
                storage_writer=FileSystemWriter(partial),
                planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                process_group=group,
            )
        if context.rank == 0:
            write_json(partial / _RECORD, record)
        _commit(partial, path, context, group)

    return write


def load_checkpoint(
    path: Path,
    *,
    chunks: Sequence[LlamaModel],
    optimization: Optimization,
    config: ModelConfig,
    lora_rank: int,
    context: RankContext,
) -> dict[str, str]:
    """Continue from `begin_checkpoint`; every rank calls it; returns the saved `state`.

    Raises:
        CheckpointError: nothing there, incomplete, or another model's.
    """
    record = read_record(path)
    _check_model(path, record["tensors"], config)
    if record["lora_rank"] != lora_rank:
        raise CheckpointError(
            f"{str(path)!r} was trained with lora.rank {record['lora_rank']}, and lora.rank is {lora_rank} here; "
            "continue with the same"
        )
    content: dict[str, Any] = _weights(chunks)
    entries = _flat(content)
    same_layout = {"expert": 1, **record["parallel"]} == _layout(context)
    if same_layout:
        content["rng"] = random_state(context)
    try:
        with quiet_megatron():
            owned = optimization.owned() if record["adam_steps"] else []
            places: dict[str, Any] = dict(sharded_state(owned, entries, vocab_size=config.vocab_size))
            loaded = dist_checkpointing.load(content, str(path))
            if record["adam_steps"]:
                torch_load(
                    places,
                    storage_reader=FileSystemReader(path),
                    planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                )
    except (CheckpointingException, CheckpointException, OSError) as error:
        raise CheckpointError(f"the checkpoint {str(path)!r} cannot be read: {error}") from error
    for chunk, key in zip(chunks, _keys(chunks)):
        left = chunk.load_state_dict(loaded[key], strict=False)
        wrong = sorted(name for name in (*left.missing_keys, *left.unexpected_keys) if not name.endswith(_EXTRA))
        if wrong:
            raise CheckpointError(f"the checkpoint {str(path)!r} and the model differ in {choices(wrong)}")
    optimization.restore(adam_steps=record["adam_steps"], schedule=loaded["scheduler"])
    if same_layout:
        restore_random_state(loaded["rng"])
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


def _weights(chunks: Sequence[LlamaModel]) -> dict[str, Any]:
    """megatron-core's description of each chunk's weights, by its key; without what only Transformer Engine keeps, so
    that its layers and torch's read each other's checkpoints."""
    return {
        key: {name: entry for name, entry in chunk.sharded_state_dict().items() if not name.endswith(_EXTRA)}
        for chunk, key in zip(chunks, _keys(chunks))
    }


def _flat(weights: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """All chunks' entries together."""
    return {f"{key}.{name}": entry for key, part in weights.items() for name, entry in part.items()}


def _owned(optimization: Optimization) -> list[OwnedRange]:
    """AdamW has nothing before its first step."""
    return optimization.owned() if optimization.adam_steps else []


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
        "expert": parallel.expert,
        "data": parallel.data,
    }
