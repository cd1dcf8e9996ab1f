"""Write a Hugging Face directory: safetensors files up to a size, a correct index, config and carried files.

Tensors come one at a time, in any order, and go straight to their place on disk: every offset is known beforehand.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch

from align_convert.arrays import Held, dense
from align_convert.atomic import check_destination, new_directory, new_file
from align_convert.carried import write_description
from align_convert.config import ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES
from align_convert.errors import FormatError, PlanError
from align_convert.output import Output, OutputFile

_PAGE = 4096  # data that begins on a page can be written past the page cache
DEFAULT_MAX_SHARD_SIZE = 5_000_000_000  # bytes; as transformers' save_pretrained of the Llama-2 era


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePlan:
    """One safetensors file: its name, the bytes before the data, and where each tensor's bytes start."""

    name: str
    header: bytes
    offsets: Mapping[str, int]
    size: int
    """Of the whole file, bytes."""


def plan_files(
    shapes: Mapping[str, tuple[int, ...]], *, dtype: torch.dtype, max_shard_size: int = DEFAULT_MAX_SHARD_SIZE
) -> tuple[FilePlan, ...]:
    """Spread tensors over files of at most `max_shard_size` bytes of data; a larger tensor gets a file of its own."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * dtype.itemsize
        if groups[-1] and filled + num_bytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += num_bytes
    return tuple(
        _plan_file(_file_name(number, len(groups)), {name: shapes[name] for name in group}, dtype)
        for number, group in enumerate(groups, start=1)
    )


class HfWriter:
    """Takes tensors one by one into the planned files of a directory; a context manager."""

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        dtype: torch.dtype,
        max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    ) -> None:
        """Plan the files of `shapes`; nothing is opened before the block is entered."""
        self._directory = directory
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._plans = plan_files(shapes, dtype=dtype, max_shard_size=max_shard_size)
        self._plan_of = {name: plan for plan in self._plans for name in plan.offsets}
        self._files: dict[str, BinaryIO] = {}
        self._written: set[str] = set()
        self._stack = ExitStack()

    def __enter__(self) -> "HfWriter":
        """Create the files with their headers."""
        with self._stack:
            for plan in self._plans:
                file = self._stack.enter_context(new_file(self._directory / plan.name))
                file.write(plan.header)
                file.truncate(plan.size)
                self._files[plan.name] = file
            self._stack = self._stack.pop_all()
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, cast to the directory's type.

        Raises:
            PlanError: not a tensor of the plan, another shape, or written twice.
        """
        if name not in self._shapes:
            raise PlanError(f"tensor {name!r} is not one of the {len(self._shapes)} planned")
        if name in self._written:
            raise PlanError(f"tensor {name!r} is given twice")
        if tuple(tensor.shape) != self._shapes[name]:
            raise PlanError(f"tensor {name!r} has shape {tuple(tensor.shape)}; the plan says {self._shapes[name]}")
        plan = self._plan_of[name]
        file = self._files[plan.name]
        file.seek(plan.offsets[name])
        data = tensor.detach().to(device="cpu", dtype=self._dtype).contiguous()
        file.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._written.add(name)

    def __exit__(self, *error: object) -> None:
        """Complete the files and their index, or remove them if the block failed or tensors are missing."""
        if error[0] is not None:
            self._stack.__exit__(*error)  # type: ignore[arg-type]
            return
        with self._stack:
            missing = sorted(set(self._shapes) - self._written)
            if missing:
                raise PlanError(f"{len(missing)} of {len(self._shapes)} tensors were not given, first {missing[0]!r}")
        if len(self._plans) > 1:
            self._write_index()

    def _write_index(self) -> None:
        _write_index(self._directory, self._plans, self._shapes, self._dtype)


def plan_hf(
    config: ModelConfig, *, dtype: torch.dtype, max_shard_size: int = DEFAULT_MAX_SHARD_SIZE, carry_from: Path | None
) -> Output:
    """Plan a whole Hugging Face directory to the byte."""
    shapes = config.tensors()
    plans = plan_files(shapes, dtype=dtype, max_shard_size=max_shard_size)
    targets = {}
    for plan in plans:
        for name, offset in plan.offsets.items():
            array = dense(Path(plan.name), offset, shapes[name], dtype)
            targets[name] = (Held((0, array.rows), (0, array.columns), array, 0, 0),)

    def finish(root: Path) -> None:
        if len(plans) > 1:
            _write_index(root, plans, shapes, dtype)
        write_description(root, config, dtype=dtype, carry_from=carry_from)

    files = (OutputFile(path=Path(plan.name), size=plan.size, literals=((0, plan.header),)) for plan in plans)
    return Output(files=tuple(files), targets=targets, paddings=(), dtype=dtype, finish=finish)


def write_hf(
    directory: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    dtype: torch.dtype,
    max_shard_size: int = DEFAULT_MAX_SHARD_SIZE,
    carry_from: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a whole Hugging Face directory; it appears complete or not at all.

    Args:
        tensors: every tensor of `config.tensors()` once, in any order; each is dropped before the next is asked for.
        carry_from: a directory with tokenizer and other files to copy.
        overwrite: replace a checkpoint that is already there.
    Raises:
        FormatError: the destination is taken. PlanError: a tensor is missing, unknown or of the wrong shape.
    """
    path = Path(directory)
    check_destination(path, overwrite=overwrite)
    with new_directory(path) as temporary:
        with HfWriter(temporary, config.tensors(), dtype=dtype, max_shard_size=max_shard_size) as writer:
            for name, tensor in tensors:
                writer.write(name, tensor)
        write_description(temporary, config, dtype=dtype, carry_from=None if carry_from is None else Path(carry_from))


def _write_index(
    directory: Path, plans: Sequence[FilePlan], shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
) -> None:
    total = sum(prod(shape) for shape in shapes.values()) * dtype.itemsize
    weight_map = {name: plan.name for plan in plans for name in plan.offsets}
    raw = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    with new_file(directory / "model.safetensors.index.json") as file:
        file.write((raw + "\n").encode("utf-8"))


def _file_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _plan_file(name: str, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> FilePlan:
    """Header: 8 bytes of length, JSON padded with spaces to whole pages, then the data without holes.

    Source: the safetensors format description (huggingface/safetensors, README).
    """
    if dtype not in SAFETENSORS_NAMES:
        raise FormatError(f"weights cannot be written as {dtype}; use float32, float16 or bfloat16")
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts = {}
    end = 0
    for tensor, shape in shapes.items():
        starts[tensor] = end
        end += prod(shape) * dtype.itemsize
        entries[tensor] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [starts[tensor], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-(8 + len(text)) % _PAGE)
    header = len(text).to_bytes(8, "little") + text
    offsets = {tensor: len(header) + start for tensor, start in starts.items()}
    return FilePlan(name=name, header=header, offsets=offsets, size=len(header) + end)
