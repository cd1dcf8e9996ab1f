"""The copy itself: tiles of Hugging Face tensors, read from wherever they lie, written to wherever they belong.

A tile is some rows of one tensor, all its columns. It is gathered from the source's arrays into memory, cast, and
written to every place of the output that holds a part of it. A few threads do this at once, each with its own buffers,
so memory is bounded whatever the size of the model, and reading overlaps with writing.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from align_convert.arrays import INTEGERS, Array, Held, Padding, Span, covered, cut
from align_convert.diskio import Buffer, Mode, Reader, Writer
from align_convert.dtypes import dtype_name
from align_convert.errors import ConfigError, PlanError
from align_convert.manifest import Chunk, Journal, digest_of
from align_convert.output import Output

Bits = npt.NDArray[np.signedinteger]

DEFAULT_MEMORY = 512 << 20  # bytes
MIN_MEMORY = 16 << 20  # bytes; below, the buffers would be smaller than one row of a large model
_TILE = 8 << 20  # bytes; larger tiles are not faster
_BUFFERS = 5  # tiles that a thread may hold: read, gathered, cast (at most twice as wide), to be written
_THREADS = 4  # two read while two write; more gain nothing on one disk


class Tile(NamedTuple):
    """Rows of one Hugging Face tensor."""

    name: str
    rows: Span
    columns: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How much memory and how many threads a copy takes."""

    memory: int = DEFAULT_MEMORY
    """Bytes for buffers, above what the interpreter and torch take."""
    threads: int = _THREADS
    mode: Mode = "direct"

    def __post_init__(self) -> None:
        if self.memory < MIN_MEMORY:
            raise ConfigError(f"memory of {self.memory} bytes is too little; give at least {MIN_MEMORY >> 20}MiB")
        if self.threads < 1:
            raise ConfigError(f"{self.threads} threads cannot copy anything; use 1 or more")

    @property
    def workers(self) -> int:
        """Threads that the memory allows."""
        return max(1, min(self.threads, self.memory // (_BUFFERS * (2 << 20))))

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile."""
        return min(_TILE, self.memory // (_BUFFERS * self.workers))

    @property
    def peak_bytes(self) -> int:
        """Buffers of all threads together."""
        return self.workers * self.tile_bytes * _BUFFERS


class Task(NamedTuple):
    """A numbered piece of work: a tile, or rows of padding."""

    number: int
    work: Tile | Padding


def tasks(output: Output, source: Mapping[str, Sequence[Held]], tile_bytes: int) -> Iterator[Task]:
    """All work of a copy, in the order of the output's tensors."""
    number = 0
    for name in output.targets:
        for tile in tiles(name, source[name], tile_bytes):
            yield Task(number, tile)
            number += 1
    for padding in output.paddings:
        step = max(1, tile_bytes // padding.array.row_bytes)
        for start in range(*padding.rows, step):
            rows = (start, min(start + step, padding.rows[1]))
            yield Task(number, padding._replace(rows=rows))
            number += 1


def tiles(name: str, held: Sequence[Held], tile_bytes: int) -> Iterator[Tile]:
    """A tensor's tiles; their heights are round numbers, so that parts of them fill whole pages."""
    rows, columns = max(h.rows[1] for h in held), max(h.columns[1] for h in held)
    step = max(1, tile_bytes // (columns * held[0].array.dtype.itemsize))
    step = step // 64 * 64 if step > 64 else step
    for start in range(0, rows, step):
        yield Tile(name, (start, min(start + step, rows)), columns)


class Gatherer:
    """Reads tiles; one a thread."""

    def __init__(self, reader: Reader, tile_bytes: int) -> None:
        """Own buffers, shared files."""
        self._reader = reader
        self._tile_bytes = tile_bytes
        self._read = Buffer()
        self._tile = Buffer()

    def gather(self, tile: Tile, held: Sequence[Held]) -> Bits:
        """The tile's bits, [rows, columns]; valid until the next call."""
        parts = [part for part in (cut(h, tile.rows) for h in held) if part is not None]
        height = tile.rows[1] - tile.rows[0]
        if covered(parts) != height * tile.columns:
            raise PlanError(f"rows {tile.rows} of tensor {tile.name!r} are not all in the source")
        if len(parts) == 1 and parts[0].array.stride == parts[0].array.row_bytes:
            return self._rows(parts[0].array, parts[0].row, height)
        itemsize = parts[0].array.dtype.itemsize
        kind = INTEGERS[itemsize]
        memory = self._tile.take(height * tile.columns * itemsize)
        result: Bits = np.frombuffer(memory, kind, height * tile.columns).reshape(height, tile.columns)
        for part in parts:
            self._place(part, result, tile.rows[0])
        return result

    def _place(self, part: Held, result: Bits, top: int) -> None:
        """Read a part, some rows at a time where they lie far apart, and put it into the tile."""
        height, width = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
        step = max(1, self._tile_bytes // part.array.stride)
        for start in range(0, height, step):
            count = min(step, height - start)
            rows = self._rows(part.array, part.row + start, count)
            at = part.rows[0] - top + start
            result[at : at + count, slice(*part.columns)] = rows[:, part.column : part.column + width]

    def _rows(self, array: Array, row: int, count: int) -> Bits:
        """Whole rows of an array, in the read buffer."""
        itemsize = array.dtype.itemsize
        size = (count - 1) * array.stride + array.row_bytes
        data = self._reader.read(array.path, array.row_offset(row), size, self._read)
        kind = INTEGERS[itemsize]
        return np.ndarray((count, array.columns), kind, data, 0, (array.stride, itemsize))


class _Copier:
    """Carries out tasks; one a thread."""

    def __init__(self, gatherer: Gatherer, writer: Writer, root: Path, output: Output) -> None:
        self._gatherer = gatherer
        self._writer = writer
        self._root = root
        self._output = output
        self._out = Buffer()

    def run(self, task: Task, source: Mapping[str, Sequence[Held]]) -> list[Chunk]:
        """Do one task; returns what was written."""
        if isinstance(task.work, Padding):
            padding = task.work
            tile = Tile(padding.name, (padding.hf_row, padding.hf_row + 1), padding.array.columns)
            row = self._values(tile, source[padding.name])
            count = padding.rows[1] - padding.rows[0]
            return [self._put(np.broadcast_to(row, (count, row.shape[1])), padding.array, padding.rows[0])]
        tile = task.work
        values = self._values(tile, source[tile.name])
        written = []
        for target in self._output.targets[tile.name]:
            part = cut(target, tile.rows)
            if part is not None:
                top = tile.rows[0]
                block = values[part.rows[0] - top : part.rows[1] - top, slice(*part.columns)]
                written.append(self._put(block, part.array, part.row))
        return written

    def _values(self, tile: Tile, held: Sequence[Held]) -> Bits:
        return cast(self._gatherer.gather(tile, held), held[0].array.dtype, self._output.dtype, name=tile.name)

    def _put(self, block: Bits, array: Array, row: int) -> Chunk:
        """Write whole rows of an array of the output."""
        if block.shape[1] != array.columns:
            raise PlanError(f"the plan writes {block.shape[1]} of {array.columns} columns of {str(array.path)!r}")
        path, offset, size = self._root / array.path, array.row_offset(row), block.size * block.itemsize
        start = self._writer.buffer_start(path, offset)
        data = self._out.take(start + size)[start : start + size]
        np.frombuffer(data, block.dtype).reshape(block.shape)[...] = block
        self._writer.write(path, offset, data)
        return Chunk(array.path.as_posix(), offset, size, digest_of(data))


def cast(values: Bits, stored: torch.dtype, wanted: torch.dtype, *, name: str) -> Bits:
    """The same numbers in another type, rounded to nearest even.

    Raises:
        PlanError: a finite value does not fit; naming the tensor.
    """
    if stored == wanted:
        return values
    numbers = torch.from_numpy(np.require(values, requirements=["C", "A", "W"])).view(stored)
    result = numbers.to(wanted)
    if wanted == torch.float16 and bool((torch.isinf(result) & torch.isfinite(numbers)).any()):
        worst = float(numbers[torch.isfinite(numbers)].abs().max())
        raise PlanError(f"tensor {name!r} has a value of size {worst:g}, which {dtype_name(wanted)} cannot hold")
    bits: Bits = result.view(torch.int16 if wanted.itemsize == 2 else torch.int32).numpy()
    return bits


def transfer(
    output: Output,
    source: Mapping[str, Sequence[Held]],
    root: Path,
    *,
    settings: Settings,
    journal: Journal,
    tile_bytes: int,
    progress: Callable[[int], None],
) -> list[Chunk]:
    """Write all weight files of `output` below `root`, synced to the disk; returns the pieces that make them up.

    Args:
        source: where each Hugging Face tensor lies.
        journal: whose finished tasks are left out; gets a line for each further one.
        progress: called with bytes just written, from one thread at a time.
    Raises:
        ConvertError, OSError: the first that any thread met.
    """
    with Reader(settings.mode) as reader, Writer(settings.mode) as writer:
        for path in sorted({held.array.path for name in output.targets for held in source[name]}):
            reader.open(path)
        chunks = _write_literals(output, writer, root)
        todo = tasks(output, source, tile_bytes)
        lock, stop = threading.Lock(), threading.Event()

        def next_task() -> Task | None:
            with lock:
                for task in todo:
                    if task.number not in journal.done:
                        return task
                    finish(task.number, journal.done[task.number])
            return None

        def finish(number: int, written: list[Chunk]) -> None:
            chunks.extend(written)
            progress(sum(chunk.length for chunk in written))

        def work() -> None:
            copier = _Copier(Gatherer(reader, tile_bytes), writer, root, output)
            while not stop.is_set() and (task := next_task()) is not None:
                written = copier.run(task, source)
                with lock:
                    journal.add(task.number, written)
                    finish(task.number, written)

        in_threads(work, settings.workers, stop)
        writer.sync()
    return chunks


def in_threads(work: Callable[[], None], count: int, stop: threading.Event) -> None:
    """Run `work` in `count` threads until all have returned; the first error, also an interrupt, stops the others."""
    with ThreadPoolExecutor(count, thread_name_prefix="align-convert") as pool:
        futures = [pool.submit(work) for _ in range(count)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            stop.set()


def _write_literals(output: Output, writer: Writer, root: Path) -> list[Chunk]:
    chunks = []
    for file in output.files:
        writer.create(root / file.path, file.size)
        for offset, data in file.literals:
            writer.write_plain(root / file.path, offset, data)
            chunks.append(Chunk(file.path.as_posix(), offset, len(data), digest_of(data)))
    return chunks
