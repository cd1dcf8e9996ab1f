"""Whole-checkpoint copies: any readable directory into a Megatron or a Hugging Face one.

Each copy is first a plan (what is written, how large), with everything refused that can be known beforehand; then
`transfer` carries it out, in bounded memory, into a hidden directory beside the destination that is renamed when whole.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal, get_args

import torch

from align_convert.atomic import (
    becoming,
    check_apart,
    check_destination,
    check_space,
    unfinished,
    unfinished_directory,
)
from align_convert.carried import carried_files
from align_convert.dtypes import dtype_name
from align_convert.errors import PlanError
from align_convert.formats.dist_output import plan_dist
from align_convert.formats.hf_writer import DEFAULT_MAX_SHARD_SIZE, plan_hf
from align_convert.formats.megatron_args import knows_rope_scaling
from align_convert.formats.megatron_names import Naming
from align_convert.formats.megatron_output import plan_megatron
from align_convert.layout import Layout
from align_convert.manifest import JOURNAL, MANIFEST, Journal, digest_file, digest_of, write_manifest
from align_convert.output import Output
from align_convert.source import Source
from align_convert.transfer import Settings, transfer

Progress = Callable[[int], None]
"""Called with a number of bytes: once with the total, before anything is written, or with those just written."""

MegatronFormat = Literal["torch", "torch_dist"]
FORMATS: tuple[str, ...] = get_args(MegatronFormat)
DEFAULT_SETTINGS = Settings()


def _ignore(_: int) -> None:
    """No progress to show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyPlan:
    """What a copy writes."""

    source: Source
    destination: Path
    output: Output
    carried: tuple[str, ...]
    """Files beside the weights that come along."""
    warnings: tuple[str, ...]

    @property
    def files(self) -> tuple[tuple[str, int], ...]:
        """Weight files below the destination, with their bytes of weights."""
        return tuple((str(file.path), file.weight_bytes) for file in self.output.files)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights to be written."""
        return self.output.dtype

    @property
    def total_bytes(self) -> int:
        """Of all weights to be written."""
        return self.output.weight_bytes


def plan_to_megatron(
    source: Source,
    destination: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    file_format: MegatronFormat = "torch",
    naming: Naming = "local",
    overwrite: bool = False,
) -> CopyPlan:
    """Check a copy to Megatron and say what it would write; touches nothing.

    Args:
        layout: of `torch` files; `torch_dist` files are the same for every layout, but padded for this one.
        dtype: what weights are cast to; None keeps the source's.
        naming: spelling of `torch` files; `torch_dist` has only one.
    Raises:
        ConvertError: the source is incomplete, the layout impossible, or the destination taken or too small.
    """
    layout.check(source.config)
    chosen = _check_copy(source, destination, dtype=dtype, overwrite=overwrite)
    if file_format == "torch_dist":
        output = plan_dist(source.config, layout, dtype=chosen, carry_from=source.root)
    else:
        output = plan_megatron(source.config, layout, dtype=chosen, naming=naming, carry_from=source.root)
    return _plan(source, destination, output, more_warnings=_megatron_warnings(source))


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
    output = plan_hf(source.config, dtype=chosen, max_shard_size=max_shard_size, carry_from=source.root)
    return _plan(source, destination, output)


def run(
    plan: CopyPlan,
    *,
    settings: Settings = DEFAULT_SETTINGS,
    resume: bool = False,
    start: Progress = _ignore,
    progress: Progress = _ignore,
) -> None:
    """Write what was planned; the destination appears complete or not at all.

    Args:
        resume: go on where a run that was killed or interrupted has stopped, if there was one.
    Raises:
        ConvertError, OSError: nothing is left behind, except where an unfinished copy is of something else or its
            journal is damaged: that stays as it is. KeyboardInterrupt: what was written is kept for `resume`.
    """
    start(plan.total_bytes)
    with unfinished_directory(plan.destination, resume=resume) as root:
        journal = Journal(root / JOURNAL, _fingerprint(plan), tile_bytes=settings.tile_bytes, resume=resume)
        with becoming(plan.destination, root):
            _write(plan, root, journal, settings=settings, progress=progress)


def _write(plan: CopyPlan, root: Path, journal: Journal, *, settings: Settings, progress: Progress) -> None:
    """Fill the unfinished directory, whose journal is closed here and removed last."""
    output, weights = plan.output, {file.path for file in plan.output.files}
    try:
        for path in list(output.small_files(root)):
            if path != Path(JOURNAL) and path not in weights:
                (root / path).unlink()
        journal.confirm(root, mode=settings.mode)
        chunks = transfer(
            output,
            plan.source.held(),
            root,
            settings=settings,
            journal=journal,
            tile_bytes=journal.tile_bytes,
            progress=progress,
        )
    finally:
        journal.close()
    output.finish(root)
    small = [path for path in output.small_files(root) if path.name not in (JOURNAL, MANIFEST)]
    write_manifest(root, [*chunks, *(chunk for path in small for chunk in digest_file(root, path))])
    (root / JOURNAL).unlink()


def to_megatron(
    source: Source,
    destination: str | Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None = None,
    file_format: MegatronFormat = "torch",
    naming: Naming = "local",
    overwrite: bool = False,
    settings: Settings = DEFAULT_SETTINGS,
    resume: bool = False,
    start: Progress = _ignore,
    progress: Progress = _ignore,
) -> CopyPlan:
    """Write `source` as a Megatron directory: `plan_to_megatron`, then `run`."""
    plan = plan_to_megatron(
        source,
        Path(destination),
        layout=layout,
        dtype=dtype,
        file_format=file_format,
        naming=naming,
        overwrite=overwrite,
    )
    run(plan, settings=settings, resume=resume, start=start, progress=progress)
    return plan


def to_hf(
    source: Source,
    destination: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    overwrite: bool = False,
    settings: Settings = DEFAULT_SETTINGS,
    resume: bool = False,
    start: Progress = _ignore,
    progress: Progress = _ignore,
) -> CopyPlan:
    """Write `source` as a Hugging Face directory: `plan_to_hf`, then `run`."""
    plan = plan_to_hf(source, Path(destination), dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    run(plan, settings=settings, resume=resume, start=start, progress=progress)
    return plan


def _check_copy(source: Source, destination: Path, *, dtype: torch.dtype | None, overwrite: bool) -> torch.dtype:
    """The checks that both directions share, the cheap ones first; returns the type to write."""
    check_apart(source.root, destination)
    check_destination(destination, overwrite=overwrite)
    source.check()
    return dtype if dtype is not None else _common_dtype(source)


def _plan(source: Source, destination: Path, output: Output, *, more_warnings: Sequence[str] = ()) -> CopyPlan:
    carried = ("config.json", *(path.name for path in carried_files(source.root)))
    plan = CopyPlan(
        source=source,
        destination=destination,
        output=output,
        carried=carried,
        warnings=(*source.warnings, *_warnings(source, output.dtype), *more_warnings),
    )
    already = unfinished(destination)
    written = sum(path.stat().st_blocks * 512 for path in already.rglob("*")) if already.is_dir() else 0
    check_space(destination, sum(file.size for file in output.files) - written)
    return plan


def _warnings(source: Source, dtype: torch.dtype) -> list[str]:
    found = []
    stored = {kind for _, kind in source.tensors().values()}
    narrowed = [kind for kind in stored if kind != dtype and torch.promote_types(kind, dtype) != dtype]
    if narrowed:
        names = " and ".join(sorted(dtype_name(kind) for kind in narrowed))
        found.append(f"weights are rounded from {names} to {dtype_name(dtype)}; they will not come back bit for bit")
    if source.config.head == "pooler":
        found.append("the score head has two layers, which transformers cannot load; only align-convert reads it back")
    return found


def _megatron_warnings(source: Source) -> list[str]:
    if knows_rope_scaling(source.config):
        return []
    scaling = dict(source.config.rope_scaling or {})
    return [f"Megatron's args have no word for rope scaling {scaling}; Megatron would compute unscaled positions"]


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


def _fingerprint(plan: CopyPlan) -> dict[str, object]:
    """What must not change between a run and the one that resumes it."""
    held = plan.source.held()
    paths = sorted({place.array.path for name in plan.output.targets for place in held[name]})
    stats = [(str(path), path.stat()) for path in paths]
    literals = [(str(f.path), f.size, [digest_of(data) for _, data in f.literals]) for f in plan.output.files]
    return {
        "align-convert": metadata.version("align-convert"),
        "source": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "output": digest_of(repr(literals).encode("utf-8")),
        "dtype": dtype_name(plan.dtype),
    }
