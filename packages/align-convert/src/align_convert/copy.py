"""Whole-checkpoint copies: any readable directory into a Megatron or a Hugging Face one.

Each copy is first a plan (what is written, how large), with everything refused that can be known beforehand; then it
runs rank by rank or tensor by tensor, so that at most one output file's tensors are in memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from align_convert.atomic import check_apart, check_destination, check_space, new_directory
from align_convert.carried import carried_files
from align_convert.dtypes import dtype_name
from align_convert.errors import PlanError
from align_convert.fill import fill_shard
from align_convert.formats.hf_writer import DEFAULT_MAX_SHARD_SIZE, plan_files, write_hf
from align_convert.formats.megatron_files import iteration_folder, rank_file
from align_convert.formats.megatron_writer import finish_megatron, write_megatron_rank
from align_convert.layout import Layout, Rank
from align_convert.plan import rank_plan
from align_convert.source import Source

Progress = Callable[[int], None]
"""Called with a number of bytes: once with the total, before anything is written, or with those just converted."""

_ITERATION = 1  # Megatron takes 0 for "nothing to resume", and its loaders reject `release` here and there


def _ignore(_: int) -> None:
    """No progress to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPlan:
    """What a copy writes."""

    files: tuple[tuple[str, int], ...]
    """Weight files below the destination, with their bytes of weights."""
    carried: tuple[str, ...]
    """Files beside the weights that come along."""
    dtype: torch.dtype
    peak_bytes: int
    """Weights in memory at once: one rank's file on the way to Megatron, one tensor on the way to Hugging Face."""

    @property
    def total_bytes(self) -> int:
        """Weights written."""
        return sum(size for _, size in self.files)


def plan_to_megatron(
    source: Source, destination: Path, *, layout: Layout, dtype: torch.dtype | None = None, overwrite: bool = False
) -> CopyPlan:
    """Check a copy to Megatron and say what it would write; touches nothing.

    Args:
        dtype: what weights are cast to; None keeps the source's.
    Raises:
        ConvertError: the source is incomplete, the layout impossible, or the destination taken or too small.
    """
    layout.check(source.config)
    chosen = _check_copy(source, destination, dtype=dtype, overwrite=overwrite)
    folder = iteration_folder(Path(), _ITERATION)
    files = [
        (str(rank_file(folder, layout, rank)), _rank_bytes(source, layout, chosen, rank)) for rank in layout.files()
    ]
    plan = CopyPlan(
        files=tuple(files), carried=_carried_names(source), dtype=chosen, peak_bytes=max(size for _, size in files)
    )
    check_space(destination, plan.total_bytes)
    return plan


def to_megatron(
    source: Source,
    destination: str | Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    start: Progress = _ignore,
    progress: Progress = _ignore,
) -> CopyPlan:
    """Write `source` as a Megatron directory; it appears complete or not at all.

    Raises:
        ConvertError: as `plan_to_megatron`, before anything is written.
    """
    path = Path(destination)
    plan = plan_to_megatron(source, path, layout=layout, dtype=dtype, overwrite=overwrite)
    start(plan.total_bytes)
    with new_directory(path) as temporary:
        for rank in layout.files():
            chunks = [
                dict(_filled(source, layout, replace(rank, vp=vp), plan.dtype, progress)) for vp in range(layout.vp)
            ]
            write_megatron_rank(
                temporary,
                config=source.config,
                layout=layout,
                rank=rank,
                chunks=chunks,
                dtype=plan.dtype,
                iteration=_ITERATION,
            )
        finish_megatron(
            temporary,
            config=source.config,
            layout=layout,
            dtype=plan.dtype,
            iteration=_ITERATION,
            carry_from=source.root,
        )
    return plan


def plan_to_hf(
    source: Source,
    destination: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> CopyPlan:
    """Check a copy to Hugging Face and say what it would write; touches nothing.

    Raises:
        ConvertError: the source is incomplete, or the destination taken or too small.
    """
    chosen = _check_copy(source, destination, dtype=dtype, overwrite=overwrite)
    shapes = source.config.tensors()
    files = plan_files(shapes, dtype=chosen, max_shard_size=max_shard_size)
    plan = CopyPlan(
        files=tuple((file.name, file.size - len(file.header)) for file in files),
        carried=_carried_names(source),
        dtype=chosen,
        peak_bytes=max(prod(shape) for shape in shapes.values()) * chosen.itemsize,
    )
    check_space(destination, plan.total_bytes)
    return plan


def to_hf(
    source: Source,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    start: Progress = _ignore,
    progress: Progress = _ignore,
) -> CopyPlan:
    """Write `source` as a Hugging Face directory; it appears complete or not at all.

    Raises:
        ConvertError: as `plan_to_hf`, before anything is written.
    """
    path = Path(destination)
    plan = plan_to_hf(source, path, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    start(plan.total_bytes)
    write_hf(
        path,
        source.config,
        _read_all(source, plan.dtype, progress),
        dtype=plan.dtype,
        max_shard_size=max_shard_size,
        carry_from=source.root,
        overwrite=overwrite,
    )
    return plan


def _check_copy(source: Source, destination: Path, *, dtype: torch.dtype | None, overwrite: bool) -> torch.dtype:
    """The checks that both directions share, the cheap ones first; returns the type to write."""
    check_apart(source.root, destination)
    check_destination(destination, overwrite=overwrite)
    source.check()
    return dtype if dtype is not None else _common_dtype(source)


def _common_dtype(source: Source) -> torch.dtype:
    counts: dict[str, int] = {}
    found = source.tensors()
    stored = {name: found[name][1] for name in source.config.tensors()}
    for dtype in stored.values():
        counts[dtype_name(dtype)] = counts.get(dtype_name(dtype), 0) + 1
    if len(counts) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))
        raise PlanError(f"tensors have several types: {listed}; choose one with --dtype")
    return next(iter(stored.values()))


def _carried_names(source: Source) -> tuple[str, ...]:
    return ("config.json", *(path.name for path in carried_files(source.root)))


def _rank_bytes(source: Source, layout: Layout, dtype: torch.dtype, rank: Rank) -> int:
    ranks = [replace(rank, vp=vp) for vp in range(layout.vp)]
    shards = [shard for rank in ranks for shard in rank_plan(source.config, layout, rank)]
    return sum(prod(shard.shape) for shard in shards) * dtype.itemsize


def _filled(
    source: Source, layout: Layout, rank: Rank, dtype: torch.dtype, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    for shard in rank_plan(source.config, layout, rank):
        tensor = fill_shard(shard, source.read_hf, dtype)
        progress(tensor.numel() * tensor.itemsize)
        yield shard.name, tensor


def _read_all(source: Source, dtype: torch.dtype, progress: Progress) -> Iterator[tuple[str, torch.Tensor]]:
    for name in source.config.tensors():
        tensor = source.read_hf(name)
        progress(tensor.numel() * dtype.itemsize)
        yield name, tensor
