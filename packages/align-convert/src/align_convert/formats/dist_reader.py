"""Read a `torch_dist` checkpoint of any Megatron, without megatron-core and without executing its pickles.

Only the model's weights: optimizer and random states beside them are left alone.
"""

import os
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch

from align_convert.arrays import Array, Held, Span, cut, held_by, matrix
from align_convert.config import Head, ModelConfig
from align_convert.dtypes import SAFETENSORS_NAMES
from align_convert.errors import FormatError, PlanError
from align_convert.formats.dist_names import BACKEND, COMMON, METADATA, Stacked, aliases, apart, stacked
from align_convert.formats.megatron_args import check_args_match, config_from_args
from align_convert.formats.megatron_files import Location, locate_dist
from align_convert.formats.pickles import Inert, StoredTensor, load_archive, load_pickle, read_pickle
from align_convert.layout import Layout, Rank
from align_convert.plan import Shard, rank_plan
from align_convert.stored import StoredSource

_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state", "opt_param_scheduler")
_EMBEDDING, _OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A box of a stacked tensor, and the item that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    size: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


class _Part(NamedTuple):
    """Rows and columns of one layer's tensor, and the array that holds them."""

    rows: Span
    columns: Span
    array: Array


class DistReader(StoredSource):
    """The weights of one `torch_dist` checkpoint."""

    format_name = "megatron torch_dist"

    def __init__(self, directory: str | Path) -> None:
        """Find the iteration, its tensors and its config.

        Raises:
            FormatError: files are missing, damaged, unsafe, or contradict each other.
            ConfigError: the model is not one that can be described.
        """
        self.directory = Path(directory)
        self.location: Location = locate_dist(self.directory)
        folder = self.location.folder
        self._tensors = _read_metadata(folder / METADATA)
        args = _read_args(folder)
        self.args = args or Namespace()
        if (self.location.root / "config.json").is_file():
            config = ModelConfig.from_hf(self.location.root)
        elif args is not None:
            config = config_from_args(args, head=self._find_head(), dtype=self._find(_EMBEDDING).dtype)
        else:
            raise FormatError(
                f"{str(folder / COMMON)!r} has no 'args'; put the model's config.json into {str(self.location.root)!r}"
            )
        if args is not None:
            check_args_match(args, config)
        super().__init__(self.location.root, config)
        rows = self._find(_EMBEDDING).size[0]
        if rows < config.vocab_size:
            raise PlanError(f"the embedding has {rows} rows; config.json says a vocabulary of {config.vocab_size}")
        self.layout = replace(Layout(), vocab_divisor=rows)
        self._shapes = config.tensors()
        self._arrays: dict[tuple[str, int, int], Array] = {}
        self._by_place: dict[str, dict[tuple[int, ...], list[tuple[_Chunk, int]]]] = {}
        self._held = self._build_index()

    def check(self) -> None:
        """Refuse missing tensors, tensors without a rule and wrong shapes.

        Raises:
            PlanError: naming the tensor.
        """
        known = set()
        for shard in rank_plan(self.config, self.layout, Rank()):
            place = self._place(shard.name)
            tensor = self._find(place.key)
            known |= {place.key, *aliases(place.key)}
            wanted = (*place.stack, *shard.shape)
            if tensor.size != wanted:
                raise PlanError(
                    f"tensor {place.key!r} in {str(self.directory)!r} has shape {tensor.size}; the plan says {wanted}"
                )
        for key in self._tensors:
            if key not in known and not key.startswith(_NOT_WEIGHTS):
                file = f"align_convert/families/{self.config.family}.py"
                raise PlanError(f"tensor {key!r} in {str(self.directory)!r} has no rule (add one in {file})")
        super().check()

    def _find(self, key: str) -> _Tensor:
        for name in (key, *aliases(key)):
            if name in self._tensors:
                return self._tensors[name]
        raise PlanError(f"tensor {key!r} is missing in {str(self.directory)!r}")

    def _place(self, name: str) -> Stacked:
        """Where a tensor is: stacked over layers, or, as Megatron saves layers that differ, each on its own."""
        place = stacked(name, self.config)
        if place.at and not any(key in self._tensors for key in (place.key, *aliases(place.key))):
            alone = apart(place)
            if any(key in self._tensors for key in (alone.key, *aliases(alone.key))):
                return alone
        return place

    def _find_head(self) -> Head:
        if any(key.startswith("pooler_head.") for key in self._tensors):
            return "pooler"
        output = self._tensors.get(_OUTPUT)
        return "score" if output is not None and output.size[0] == 1 else "lm"

    def _build_index(self) -> dict[str, list[Held]]:
        held: dict[str, list[Held]] = {name: [] for name in self._shapes}
        for shard in rank_plan(self.config, self.layout, Rank()):
            for part in self._parts(shard):
                for piece in shard.pieces:
                    whole = held_by(piece, part.array)  # as if the array were all of the layer's tensor
                    (top, left) = whole.row, whole.column
                    inside = cut(
                        whole,
                        _shift(part.rows, whole.rows[0] - top),
                        _shift(part.columns, whole.columns[0] - left),
                    )
                    if inside is not None:
                        row, column = inside.row - part.rows[0], inside.column - part.columns[0]
                        held[piece.hf_name].append(inside._replace(row=row, column=column))
        return held

    def _parts(self, shard: Shard) -> Iterator[_Part]:
        """The boxes that hold parts of one layer's tensor, as matrices."""
        place = self._place(shard.name)
        if not any(key in self._tensors for key in (place.key, *aliases(place.key))):
            return
        tensor = self._find(place.key)
        depth = len(place.at)
        if tensor.size != (*place.stack, *shard.shape):
            return  # `check` says so
        for chunk, layer in self._chunks_at(place, tensor):
            rows, columns = matrix(chunk.sizes[depth:])
            array = self._array(place.key, chunk, tensor.dtype, (rows, columns), layer)
            top, left = (*chunk.offsets[depth:], 0)[:2]
            yield _Part((top, top + rows), (left, left + columns), array)

    def _chunks_at(self, place: Stacked, tensor: _Tensor) -> list[tuple[_Chunk, int]]:
        """The chunks with a part of one layer (and expert), and its number within each."""
        depth = len(place.at)
        if place.key not in self._by_place:
            found: dict[tuple[int, ...], list[tuple[_Chunk, int]]] = {}
            for chunk in tensor.chunks:
                ranges = [range(at, at + size) for at, size in zip(chunk.offsets[:depth], chunk.sizes[:depth])]
                for number, index in enumerate(product(*ranges)):
                    found.setdefault(index, []).append((chunk, number))
            self._by_place[place.key] = found
        return self._by_place[place.key].get(place.at, [])

    def _array(self, key: str, chunk: _Chunk, dtype: torch.dtype, shape: tuple[int, int], layer: int) -> Array:
        """One layer of a chunk."""
        whole = self._open(key, chunk, dtype)
        rows, columns = shape
        row_bytes = columns * dtype.itemsize
        return Array(whole.path, whole.offset + layer * rows * row_bytes, rows, columns, row_bytes, dtype)

    def _open(self, key: str, chunk: _Chunk, dtype: torch.dtype) -> Array:
        """Where an item's numbers are in its file."""
        identity = (chunk.file, chunk.start, chunk.length)
        if identity not in self._arrays:
            path = self.location.folder / chunk.file
            stored = _open_item(path, chunk.start, chunk.length)
            if stored.dtype != dtype or stored.dtype not in SAFETENSORS_NAMES:
                raise FormatError(f"tensor {key!r} in {str(path)!r} is {stored.dtype}; .metadata says {dtype}")
            steps = [prod(stored.shape[axis + 1 :]) for axis in range(len(stored.shape))]
            if any(n > 1 and found != step for n, found, step in zip(stored.shape, stored.stride, steps)):
                raise FormatError(f"tensor {key!r} in {str(path)!r} is not contiguous")
            total = prod(stored.shape)
            if total != prod(chunk.sizes):
                raise FormatError(
                    f"an item of tensor {key!r} in {str(path)!r} has {total} numbers; expected {prod(chunk.sizes)}"
                )
            self._arrays[identity] = Array(path, stored.offset, total, 1, dtype.itemsize, dtype)
        return self._arrays[identity]


def _shift(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def _open_item(path: Path, start: int, length: int) -> StoredTensor:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise FormatError(f"{str(path)!r} is missing") from None
    try:
        if start + length > os.fstat(descriptor).st_size:
            raise FormatError(f"{str(path)!r} is shorter than .metadata says")
        stored = load_archive(path, descriptor, start=start, length=length)
    finally:
        os.close(descriptor)
    if not isinstance(stored, StoredTensor):
        raise FormatError(f"{str(path)!r} has an item at byte {start} that is not a tensor")
    return stored


def _read_args(folder: Path) -> Namespace | None:
    if not (folder / COMMON).is_file():
        return None
    args = load_pickle(folder / COMMON).get("args")
    return args if isinstance(args, Namespace) else None


def _read_metadata(path: Path) -> dict[str, _Tensor]:
    """Key -> tensor, from the pickled description; objects that are not tensors are left out."""
    backend = path.with_name(BACKEND)
    if backend.is_file() and b"torch_dist" not in backend.read_bytes()[:4096]:
        raise FormatError(f"{str(backend)!r} names another backend than torch_dist")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FormatError(f"{str(path)!r} cannot be read: {error}") from error
    described = read_pickle(data, path)
    wrong = FormatError(f"{str(path)!r} is not the description of a torch.distributed checkpoint")
    if not isinstance(described, Inert):
        raise wrong
    tensors, stored = described.field("state_dict_metadata"), described.field("storage_data")
    if not isinstance(tensors, dict) or not isinstance(stored, dict):
        raise wrong
    items = {}
    for index, info in stored.items():
        if not isinstance(index, Inert) or not isinstance(info, Inert):
            raise wrong
        items[str(index.field("fqn")), _numbers(index.field("offset"))] = info
    found = {}
    for key, tensor in tensors.items():
        if not isinstance(tensor, Inert):
            raise wrong
        if tensor.qualified.endswith(".TensorStorageMetadata"):
            found[str(key)] = _tensor(str(key), tensor, items, path)
    return found


def _tensor(key: str, tensor: Inert, items: dict[tuple[str, tuple[int, ...] | None], Inert], path: Path) -> _Tensor:
    wrong = FormatError(f"{str(path)!r} describes tensor {key!r} in a way that cannot be understood")
    size, chunks, properties = _numbers(tensor.field("size")), tensor.field("chunks"), tensor.field("properties")
    state = properties.state if isinstance(properties, Inert) else None
    dtype = state[0] if isinstance(state, tuple) and state else None
    if size is None or not isinstance(chunks, list) or not isinstance(dtype, torch.dtype):
        raise wrong
    result = []
    for chunk in chunks:
        offsets, sizes = (
            _numbers(chunk.field(name)) if isinstance(chunk, Inert) else None for name in ("offsets", "sizes")
        )
        info = items.get((key, offsets))
        if offsets is None or sizes is None or info is None or len(offsets) != len(size) or len(sizes) != len(size):
            raise wrong
        file, start, length = (info.field(name) for name in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or Path(file).name != file or not isinstance(start, int):
            raise wrong
        if not isinstance(length, int) or start < 0 or length < 0 or info.field("transform_descriptors"):
            raise wrong
        result.append(_Chunk(offsets, sizes, file, start, length))
    return _Tensor(size, dtype, tuple(result))


def _numbers(value: object) -> tuple[int, ...] | None:
    if isinstance(value, tuple) and all(isinstance(number, int) and number >= 0 for number in value):
        return value
    return None
