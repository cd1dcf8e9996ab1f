"""Are two directories the same model, to the last bit? Compared as Hugging Face tensors, whatever they are stored as.

Zero tolerance: NaN equals NaN of the same bits, and 0.0 differs from -0.0. The settings that change what the weights
compute (rope, norm epsilon, head ...) are compared as well. Tiles are compared by several threads in bounded memory.
"""

import threading
from collections.abc import Callable
from dataclasses import fields

import numpy as np
import torch

from align_convert.arrays import INTEGERS
from align_convert.diskio import Reader
from align_convert.dtypes import dtype_name
from align_convert.source import Source
from align_convert.transfer import Bits, Gatherer, Settings, in_threads, tiles


def _ignore(_: int) -> None:
    """No progress to show."""


def first_difference(
    a: Source, b: Source, *, settings: Settings | None = None, progress: Callable[[int], None] = _ignore
) -> str | None:
    """What differs first between two sources, as a sentence, or None.

    Args:
        progress: called with the number of bytes just compared, from one thread at a time.
    Raises:
        ConvertError: one of them is not whole.
    """
    a.check()
    b.check()
    return _names(a, b) or _kinds(a, b) or _settings(a, b) or _values(a, b, settings or Settings(), progress)


def _names(a: Source, b: Source) -> str | None:
    in_a, in_b = a.config.tensors(), b.config.tensors()
    for name in [*in_a, *in_b]:
        if name not in in_a or name not in in_b:
            return f"tensor {name!r} is only in {str((a if name in in_a else b).root)!r}"
    return None


def _kinds(a: Source, b: Source) -> str | None:
    in_a, in_b = a.tensors(), b.tensors()
    for name in a.config.tensors():
        if in_a[name] != in_b[name]:
            kinds = [f"{dtype_name(dtype)} {list(shape)}" for shape, dtype in (in_a[name], in_b[name])]
            return f"tensor {name!r} is {kinds[0]} in {str(a.root)!r} and {kinds[1]} in {str(b.root)!r}"
    return None


def _settings(a: Source, b: Source) -> str | None:
    for field in fields(a.config):
        if field.name == "hf":  # raw spelling, of no consequence for the weights
            continue
        value_a, value_b = getattr(a.config, field.name), getattr(b.config, field.name)
        if value_a != value_b:
            return f"setting {field.name!r} is {value_a!r} in {str(a.root)!r} and {value_b!r} in {str(b.root)!r}"
    return None


def _values(a: Source, b: Source, settings: Settings, progress: Callable[[int], None]) -> str | None:
    """Compare tile by tile; the first tensor in the model's order with a difference is then looked at closely."""
    held_a, held_b = a.held(), b.held()
    order = list(a.config.tensors())
    different: set[str] = set()
    todo = ((name, tile) for name in order for tile in tiles(name, held_a[name], settings.tile_bytes))
    lock, stop = threading.Lock(), threading.Event()

    def work() -> None:
        gather_a, gather_b = (Gatherer(reader, settings.tile_bytes) for _ in range(2))
        while not stop.is_set():
            with lock:
                name, tile = next(todo, (None, None))
            if name is None or tile is None:
                return
            equal = np.array_equal(gather_a.gather(tile, held_a[name]), gather_b.gather(tile, held_b[name]))
            with lock:
                if not equal:
                    different.add(name)
                    stop.set()
                progress((tile.rows[1] - tile.rows[0]) * tile.columns * held_a[name][0].array.dtype.itemsize)

    with Reader(settings.mode) as reader:
        for held in (held_a, held_b):
            for path in sorted({place.array.path for name in order for place in held[name]}):
                reader.open(path)
        in_threads(work, settings.workers, stop)
        first = next((name for name in order if name in different), None)
        return None if first is None else _describe(a, b, first, reader, settings)


def _describe(a: Source, b: Source, name: str, reader: Reader, settings: Settings) -> str:
    """Count the differing elements of a tensor and show the first."""
    shape, dtype = a.tensors()[name]
    gather_a, gather_b = (Gatherer(reader, settings.tile_bytes) for _ in range(2))
    count, first, total = 0, "", 0
    for tile in tiles(name, a.held()[name], settings.tile_bytes):
        bits_a, bits_b = gather_a.gather(tile, a.held()[name]), gather_b.gather(tile, b.held()[name])
        places = np.argwhere(bits_a != bits_b)
        if len(places) and not first:
            row, column = (int(number) for number in places[0])
            where = (tile.rows[0] + row, column)[: len(shape)]
            values = [_number(bits, row, column, dtype) for bits in (bits_a, bits_b)]
            first = f"first at {where}: {values[0]!r} in {str(a.root)!r} and {values[1]!r} in {str(b.root)!r}"
        count += len(places)
        total += bits_a.size
    return f"tensor {name!r} differs in {count} of {total} elements, {first}"


def _number(bits: Bits, row: int, column: int, dtype: torch.dtype) -> float:
    one = np.array([bits[row, column]], dtype=INTEGERS[dtype.itemsize])
    return float(torch.from_numpy(one).view(dtype).item())
